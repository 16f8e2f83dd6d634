"""What a run is asked to do: `FitConfig`, one frozen dataclass whose field descriptions are the command line's help.

No torch here: the command line reads this file to print its help.
"""

import dataclasses
import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt, TypeAdapter
from pydantic import ValidationError as PydanticError
from pydantic.dataclasses import dataclass

from lowmem_pnn.errors import CheckpointError, UnitError
from lowmem_pnn.units import parse_bytes


def _size(value: Any) -> Any:
    # pydantic collects ValueErrors, and UnitError is one.
    return parse_bytes(value) if isinstance(value, str | int) and not isinstance(value, bool) else value


def _list(value: Any) -> Any:
    """A comma list, one value, or a sequence, as a tuple."""
    if isinstance(value, str):
        parts = tuple(part.strip() for part in value.split(","))
        if not all(parts):
            raise ValueError("there is nothing between two commas, or nothing at all; write one value, or several as A,B")
        return parts
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _layer_names(value: Any) -> Any:
    return None if value is None else tuple(str(part) for part in _list(value))


def _numbers_or_all(value: Any) -> Any:
    return value if value in (None, "all") else _list(value)


Size = Annotated[PositiveInt, BeforeValidator(_size)]
Batches = Annotated[
    tuple[PositiveInt, ...] | Literal["auto"], BeforeValidator(lambda value: value if value == "auto" else _list(value))
]
Counts = Annotated[tuple[PositiveInt, ...], BeforeValidator(_list), Field(min_length=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Flags = Annotated[tuple[bool, ...], BeforeValidator(_list), Field(min_length=1)]
Optimizers = Annotated[tuple[Literal["sgd", "adam", "adamw"], ...], BeforeValidator(_list), Field(min_length=1)]
LearningRates = Annotated[tuple[Positive, ...], BeforeValidator(_list), Field(min_length=1)]
Layers = Annotated[tuple[str, ...] | None, BeforeValidator(_layer_names)]
Recovering = Annotated[tuple[PositiveInt, ...] | Literal["all"] | None, BeforeValidator(_numbers_or_all)]
DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


LARGEST_AUTO_BATCH = 512
"""Above it a step gains no speed, and a small data set has few steps."""

MethodName = Literal["pnn", "neuroflux", "exact", "backprop"]
METHODS: tuple[MethodName, ...] = ("pnn", "neuroflux", "exact", "backprop")

PerPartition = Literal["epochs", "batch_size", "optimizer", "lr", "shuffle", "kappa"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FitConfig:
    """Everything that decides a run, checked; the same values give the same run.

    Where a field is a tuple, one value holds for every partition, else there is one per partition.

    Raises:
        pydantic.ValidationError: with all faults at once. `configure` turns them into one `ConfigError`.
    """

    max_gpu_mem: Size = Field(
        description="Memory budget of the training device: the GPU, or this process where the device is the CPU (512MB, 2GiB)."
    )
    model: str = Field(
        description=(
            "mlp:WIDTH-WIDTH-..., gpt:layers=N,width=N,heads=N,context=N, cifar-resnet18, cifar-vgg11, cifar-vgg16, "
            "cifar-mobilenetv2, a torchvision name, package.module:factory, or file.py:factory."
        )
    )
    model_arg: dict[str, Any] = Field(
        default_factory=dict, description="An argument for the model's factory, as KEY=VALUE; may be repeated."
    )
    data: str = Field(
        description=(
            "digits, mnist, fashion-mnist, emnist-balanced, cifar10, cifar100, imagefolder:DIR, npz:FILE, text:FILE (bytes as "
            "tokens), or file.py:factory."
        )
    )
    data_root: Path = Field(default=Path("data"), description="Where downloaded data sets are kept.")
    method: MethodName = Field(
        default="pnn",
        description=(
            "pnn: partitions one after the other, on synthetic intermediate labels; neuroflux: blocks one after the other, every layer with a "
            "head and a loss of its own; exact: ordinary training, one partition on the "
            "device at a time; backprop: ordinary training, the whole model on the device."
        ),
    )
    partitions: PositiveInt | None = Field(
        default=None, description="Number of partitions; the planner chooses if neither this nor --cuts is given."
    )
    cuts: Layers = Field(default=None, description="Comma list of layers, by name or number from 0; each starts a new partition.")
    epochs: Counts = Field(default=(10,), description="Epochs, one number or one per partition.")
    batch_size: Batches = Field(
        default=(64,),
        description=(
            "Samples per optimizer step, one number or one per partition; auto: as many as fit at once, partition by partition, up to "
            "512, --lr being meant for 64 (pnn, neuroflux)."
        ),
    )
    micro_batch: PositiveInt | None = Field(
        default=None,
        description="Samples on the device at once, at most; the planner chooses the largest that fits if not given.",
    )
    plan_for: Literal["auto", "size", "time"] = Field(
        default="auto",
        description=(
            "What the planner prefers among the plans that fit: size: the fewest partitions with a good micro-batch; time: the least "
            "predicted seconds, from layers that are timed first; auto: size, but for exact, which trains the same by any plan up to "
            "rounding, the least seconds by nominal rates, which are the same on every machine."
        ),
    )
    optimizer: Optimizers = Field(default=("adamw",), description="sgd, adam or adamw, one or one per partition.")
    lr: LearningRates = Field(default=(1e-3,), description="Learning rate, one number or one per partition.")
    lr_schedule: Literal["constant", "cosine", "onecycle"] = Field(
        default="constant", description="How the learning rate moves over the steps."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Steps over which the learning rate first rises to --lr (constant, cosine)."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="Momentum of sgd.")
    weight_decay: NotNegative = Field(default=0.0, description="Weight decay.")
    shuffle: Flags = Field(
        default=(True,), description="Whether every epoch has an order of its own: yes or no, one or one per partition."
    )
    fused: bool = Field(
        default=True, description="Use PyTorch's fused optimizers: faster, and without temporaries; last bits differ."
    )
    step_in_backward: bool = Field(
        default=True,
        description=(
            "Step a layer's weights as soon as their gradients are whole, where a batch goes through at once: those of one layer at a "
            "time are in memory."
        ),
    )
    optimizer_state: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32",
        description=(
            "What the state of adam and adamw is kept as, in memory and on disk, for parameters of 4096 elements and more: fp32 (8 bytes "
            "a parameter), bf16 with rounding by chance (4), or int8 in blocks with a scale each (2; needs torchao)."
        ),
    )
    clip_norm: Positive | None = Field(
        default=None,
        description="Scale gradients down to this norm: of all weights (exact, backprop), or of a partition's (pnn).",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="Smoothing of the true labels in the training loss."
    )
    loss_chunk: PositiveInt | None = Field(
        default=None,
        description=(
            "Rows (samples; tokens of text) for which the last layer and the loss are computed at once; chosen if not given: all "
            "where their outputs are small."
        ),
    )
    recovery_epochs: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Epochs after training in which some partitions learn on, exactly, through the others, which are frozen.",
    )
    recover: Recovering = Field(
        default=None,
        description="Comma list of the partitions that learn in them, from 1, or all; all but the last if not given.",
    )
    kappa: LearningRates = Field(
        default=(10.0,), description="Scale of the synthetic intermediate labels, one number or one per boundary (pnn)."
    )
    sil: Literal["uniform", "normal", "orthogonal", "sparse"] = Field(
        default="uniform",
        description=(
            "How synthetic intermediate labels are drawn: uniform (the paper's), normal or orthogonal, all with the mean and the "
            "deviation of kappa * U(0, 1); or sparse: a fifth of the elements kappa, the others 0, as a ReLU has it (pnn)."
        ),
    )
    sil_target: Literal["full", "pooled"] = Field(
        default="full",
        description=(
            "What is compared with them: the boundary's tensors, or their means over positions: one value a channel, or a feature (pnn)."
        ),
    )
    parallel_sil: bool = Field(
        default=False,
        description=(
            "Partitions learn independently of each other, from the labels of one boundary to those of the next; under torchrun side "
            "by side, one process each (pnn)."
        ),
    )
    visits: Annotated[str, Field(pattern=r"^(sequential|interleaved|laps=[1-9]\d*)$")] = Field(
        default="sequential",
        description=(
            "How blocks take turns (neuroflux): sequential: all epochs of one, then the next; laps=L: so L times over, with an L-th of "
            "the epochs each; interleaved: macro-batch by macro-batch."
        ),
    )
    macro_batches: PositiveInt = Field(
        default=64,
        description=(
            "Batches that go through a block before the next one takes them (--visits interleaved); of 512 samples with "
            "--batch-size auto."
        ),
    )
    views: PositiveInt = Field(
        default=1, description="Augmented copies of a block's outputs that are kept, one epoch reading one of them (neuroflux)."
    )
    blocks: Literal["planner", "alike"] = Field(
        default="planner",
        description=(
            "Where blocks are cut (neuroflux): planner: as few as fit with a good micro-batch; alike: neighbours that can take about "
            "the same batch, as the paper has it."
        ),
    )
    block_tolerance: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.5, description="How far the batches of a block's layers may differ, as a share of the largest (--blocks alike)."
    )
    heads: Literal["adaptive", "classic", "auglocal", "linear"] = Field(
        default="adaptive",
        description=(
            "Auxiliary heads (neuroflux): adaptive has fewer filters where maps are large; classic has 256 everywhere; auglocal "
            "copies the shapes of later layers; linear is a mean and a linear layer."
        ),
    )
    exit_tolerance: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.01,
        description="How far below the best exit's validation accuracy the chosen one may be, the smallest of them (neuroflux).",
    )
    activation_dtype: Literal["float32", "bfloat16", "float16", "int8"] = Field(
        default="float32",
        description=(
            "What boundary activations are kept as on disk while partitions learn from them: float32 keeps them as they are; int8 has "
            "a scale per channel or token (pnn, neuroflux)."
        ),
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="Seed of the initial weights, the data order and all else that is random."
    )
    device: DeviceName = Field(default="auto", description="auto, cpu, cuda or cuda:INDEX; auto takes a GPU where there is one.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description=(
            "What layers compute in: fp32, or PyTorch's autocast to bf16, or to fp16 with a loss scale that moves; weights and "
            "their gradients stay float32."
        ),
    )
    channels_last: bool = Field(
        default=False,
        description="Maps (B, C, H, W) lie in memory position by position: convolutions may be faster, last bits differ.",
    )
    compile: bool = Field(
        default=False,
        description=(
            "Run layers as code that PyTorch's compiler makes before training, once for all layers that are alike (CPU; needs a C++ "
            "compiler); last bits differ."
        ),
    )
    budget_scope: Literal["process", "allocator"] = Field(
        default="process",
        description="What the budget bounds on a GPU: all that the process holds, or PyTorch's allocator alone.",
    )
    max_host_mem: Size | None = Field(
        default=None, description="Bound on host memory above what the process starts with (GPU runs)."
    )
    max_disk: Size | None = Field(default=None, description="Bound on the run directory's size on disk.")
    commit_every: NotNegative = Field(default=60.0, description="Least seconds between two commits to the run directory.")
    keep_commits: PositiveInt = Field(default=1, description="Commits kept on disk.")
    augment: Literal["none", "basic"] = Field(
        default="none", description="basic: training images are cropped out of padded ones, and flipped, anew in every epoch."
    )
    log_every: PositiveInt = Field(default=100, description="Optimizer steps between two lines of metrics.jsonl.")
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Share of the training data kept for validation."
    )
    train_limit: PositiveInt | None = Field(default=None, description="Use at most this many training samples.")
    test_limit: PositiveInt | None = Field(default=None, description="Use at most this many test samples.")

    def value_for(self, field: PerPartition, partition: int) -> Any:
        """One partition's value of a field that may have one per partition.

        Args:
            field: the field's name.
            partition: from 0.

        Returns:
            The partition's own value, or the only one.
        """
        values = getattr(self, field) if field != "batch_size" else self.batch_sizes
        return values[0] if len(values) == 1 else values[partition]

    @property
    def laps(self) -> int:
        """How often all blocks take their turn."""
        return int(self.visits.partition("=")[2] or 1)

    @property
    def steps_wait(self) -> bool:
        """Whether no partition of a sweep may step before all gradients are there: to clip their norm, or since any may overflow."""
        return self.clip_norm is not None or self.precision == "fp16"

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Samples a step as far as they are known before the plan: with `auto` the most that it may choose."""
        return (LARGEST_AUTO_BATCH,) if self.batch_size == "auto" else self.batch_size

    def to_json(self) -> str:
        """The configuration as JSON text, which `from_json` reads back."""
        return json.dumps(TypeAdapter(FitConfig).dump_python(self, mode="json"), indent=1)

    @staticmethod
    def from_json(text: str) -> "FitConfig":
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: the text is not such a configuration.
        """
        try:
            return TypeAdapter(FitConfig).validate_json(text)
        except PydanticError as error:
            faults = "; ".join(describe_fault(fault) if fault["loc"] else str(fault["msg"]) for fault in error.errors())
            raise CheckpointError(
                f"the run's config.json is not one that this version wrote ({faults}); resume with the version that wrote it"
            ) from None


def recovering(config: FitConfig, num_partitions: int) -> tuple[int, ...]:
    """The partitions that learn in the recovery epochs, from 0, ascending.

    Args:
        config: the run's configuration.
        num_partitions: of the plan.

    Example:
        >>> recovering(FitConfig(max_gpu_mem="2GB", model="mlp:4-4-2", data="digits", recovery_epochs=1), num_partitions=3)
        (0, 1)
    """
    if config.recover == "all":
        return tuple(range(num_partitions))
    if config.recover is None:
        return tuple(range(num_partitions - 1))
    return tuple(sorted({number - 1 for number in config.recover}))


def flag(name: str) -> str:
    """The command line's name of a field: `--max-gpu-mem` for `max_gpu_mem`."""
    return "--" + name.replace("_", "-")


def field_names() -> list[str]:
    """The fields of `FitConfig`, in order."""
    return [field.name for field in dataclasses.fields(FitConfig)]


def default_of(name: str) -> Any:
    """What a field of `FitConfig` is where nobody gives it."""
    info: Any = next(field for field in dataclasses.fields(FitConfig) if field.name == name).default  # pydantic's
    return info.get_default(call_default_factory=True)


def suggest(word: str, known: list[str]) -> str:
    """A tail for an error message: `; did you mean 'x'?`, or nothing if no known word is near."""
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def describe_fault(fault: Any) -> str:
    """One pydantic fault in the words of the command line."""
    name = str(fault["loc"][0])
    value = fault.get("input")
    if fault["type"] == "missing":
        example = {"max_gpu_mem": "2GB", "model": "mlp:64-256-10", "data": "digits"}[name]
        return f"{flag(name)} is missing; give {flag(name)} {example}"
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"there is no option {flag(name)}{suggest(name, field_names())}"
    if fault["type"] == "literal_error":
        known = re.findall(r"'([^']+)'", fault["ctx"]["expected"])
        return f"{flag(name)} {value!r} is none of {', '.join(known)}{suggest(str(value), known)}"
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, UnitError):
        return f"{flag(name)}: {cause}"
    if name == "device":
        return f"--device {value!r} is none of auto, cpu, cuda, cuda:INDEX{suggest(str(value), ['auto', 'cpu', 'cuda'])}"
    if fault["type"] == "bool_parsing":
        return f"{flag(name)} {value!r} is none of yes, no"
    if fault["type"] == "too_short":
        return f"{flag(name)} {value!r} is empty; give one value, or one per partition"
    message = str(fault["msg"]).replace("Input should be", "must be").replace("Value error, ", "")
    return f"{flag(name)} {value!r}: {message[0].lower()}{message[1:]}"
