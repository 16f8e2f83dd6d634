"""What a run is asked to do: `FitConfig`, one frozen dataclass whose field descriptions are the command line's help.

No torch here: the command line reads this file to print its help.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt, TypeAdapter
from pydantic import ValidationError as PydanticError
from pydantic.dataclasses import dataclass

from lowmem_pnn.errors import BudgetError, CheckpointError, ConfigError, UnitError
from lowmem_pnn.units import format_bytes, parse_bytes


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
Counts = Annotated[tuple[PositiveInt, ...], BeforeValidator(_list), Field(min_length=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rates = Annotated[tuple[Positive, ...], BeforeValidator(_list), Field(min_length=1)]
Layers = Annotated[tuple[str, ...] | None, BeforeValidator(_layer_names)]
Recovering = Annotated[tuple[PositiveInt, ...] | Literal["all"] | None, BeforeValidator(_numbers_or_all)]
DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


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
            "mlp:WIDTH-WIDTH-..., gpt:layers=N,width=N,heads=N,context=N, a torchvision name, package.module:factory, or "
            "file.py:factory."
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
    method: Literal["pnn", "exact", "backprop"] = Field(
        default="pnn",
        description=(
            "pnn: partitions one after the other, on synthetic intermediate labels; exact: ordinary training, one partition on the "
            "device at a time; backprop: ordinary training, the whole model on the device."
        ),
    )
    partitions: PositiveInt | None = Field(
        default=None, description="Number of partitions; the planner chooses if neither this nor --cuts is given."
    )
    cuts: Layers = Field(default=None, description="Comma list of layers, by name or number from 0; each starts a new partition.")
    epochs: Counts = Field(default=(10,), description="Epochs, one number or one per partition.")
    batch_size: Counts = Field(default=(64,), description="Samples per optimizer step, one number or one per partition.")
    micro_batch: PositiveInt | None = Field(
        default=None,
        description="Samples on the device at once, at most; the planner chooses the largest that fits if not given.",
    )
    optimizer: Literal["sgd", "adam", "adamw"] = Field(default="adamw", description="Optimizer.")
    lr: Rates = Field(default=(1e-3,), description="Learning rate, one number or one per partition.")
    lr_schedule: Literal["constant", "cosine", "onecycle"] = Field(
        default="constant", description="How the learning rate moves over the steps."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Steps over which the learning rate first rises to --lr (constant, cosine)."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="Momentum of sgd.")
    weight_decay: NotNegative = Field(default=0.0, description="Weight decay.")
    fused: bool = Field(
        default=True, description="Use PyTorch's fused optimizers: faster, and without temporaries; last bits differ."
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
    kappa: Rates = Field(
        default=(10.0,), description="Scale of the synthetic intermediate labels, one number or one per boundary (pnn)."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="Seed of the initial weights, the data order and all else that is random."
    )
    device: DeviceName = Field(default="auto", description="auto, cpu, cuda or cuda:INDEX; auto takes a GPU where there is one.")
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
    log_every: PositiveInt = Field(default=100, description="Optimizer steps between two lines of metrics.jsonl.")
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="Share of the training data kept for validation."
    )
    train_limit: PositiveInt | None = Field(default=None, description="Use at most this many training samples.")
    test_limit: PositiveInt | None = Field(default=None, description="Use at most this many test samples.")

    def value_for(self, field: Literal["epochs", "batch_size", "lr", "kappa"], partition: int) -> Any:
        """One partition's value of a field that may have one per partition.

        Args:
            field: the field's name.
            partition: from 0.

        Returns:
            The partition's own value, or the only one.
        """
        values = getattr(self, field)
        return values[0] if len(values) == 1 else values[partition]

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
            faults = "; ".join(_describe(fault) if fault["loc"] else str(fault["msg"]) for fault in error.errors())
            raise CheckpointError(
                f"the run's config.json is not one that this version wrote ({faults}); resume with the version that wrote it"
            ) from None


# What is trained when neither a model nor data is named: larger than 2 GB with its optimizer state, and learnt in a minute.
DEMONSTRATION: Mapping[str, Any] = {
    "model": "mlp:64-8192-8192-8192-10",
    "data": "digits",
    "epochs": (3,),
    "lr": (1e-4,),
    "kappa": (1.0,),
}

# Data sets that are kept in `data_root`.
DOWNLOADED = ("mnist", "fashion-mnist", "emnist-balanced", "cifar10", "cifar100")

# Options that only some choice of another option reads: (option, what it needs, does this run have it?).
_CONDITIONAL: tuple[tuple[str, str, Callable[[FitConfig], bool]], ...] = (
    ("kappa", "--method pnn", lambda config: config.method == "pnn"),
    ("cuts", "--method pnn or exact", lambda config: config.method != "backprop"),
    ("partitions", "--method pnn or exact", lambda config: config.method != "backprop"),
    ("recover", "--recovery-epochs", lambda config: config.recovery_epochs > 0),
    ("warmup_steps", "--lr-schedule constant or cosine", lambda config: config.lr_schedule != "onecycle"),
    ("momentum", "--optimizer sgd", lambda config: config.optimizer == "sgd"),
    ("budget_scope", "a CUDA device", lambda config: config.device != "cpu"),
    ("max_host_mem", "a CUDA device (on the CPU, --max-gpu-mem bounds the host)", lambda config: config.device != "cpu"),
    ("data_root", "a data set that is downloaded", lambda config: config.data in DOWNLOADED),
    (
        "model_arg",
        "a model that is built by a factory (not mlp: or gpt:)",
        lambda config: config.model.partition(":")[0] not in ("mlp", "gpt"),
    ),
)


def configure(**given: Any) -> FitConfig:
    """Make a configuration from what a user gave, with the defaults for the rest.

    With neither `model` nor `data` this is the demonstration: a multilayer perceptron with 2.16 GB of training state, on the digits
    that come with scikit-learn.

    Args:
        **given: fields of `FitConfig`; None means not given.

    Returns:
        A checked configuration.

    Raises:
        ConfigError: all faults, in one line.

    Example:
        >>> configure(max_gpu_mem="2GB").model
        'mlp:64-8192-8192-8192-10'
        >>> configure(max_gpu_mem="2GB", method="pnm")
        Traceback (most recent call last):
        lowmem_pnn.errors.ConfigError: --method 'pnm' is none of pnn, exact, backprop; did you mean 'pnn'?
    """
    given = {name: _absolute(name, value) for name, value in given.items() if value is not None}
    values = {"data_root": Path("data").absolute(), **given}
    if "model" not in given and "data" not in given:
        values = {**DEMONSTRATION, **values}
    try:
        config = FitConfig(**values)
    except PydanticError as error:
        # A list has a fault for each of its values.
        raise ConfigError("; ".join(dict.fromkeys(_describe(fault) for fault in error.errors()))) from None
    faults = [
        f"{flag(name)} has no effect here: it needs {need}"
        for name, need, holds in _CONDITIONAL
        if name in given and not holds(config)
    ]
    if config.method == "exact":
        faults += [
            f"{flag(name)} has {len(getattr(config, name))} values, and --method exact trains all partitions together; give one value"
            for name in ("epochs", "batch_size")
            if len(getattr(config, name)) > 1
        ]
    if config.cuts and config.partitions:
        faults.append("--cuts and --partitions exclude each other; give one")
    if config.micro_batch is not None and config.micro_batch > max(config.batch_size):
        faults.append(
            f"--micro-batch {config.micro_batch} is above --batch-size {max(config.batch_size)}; "
            f"give at most {max(config.batch_size)}, or a larger --batch-size"
        )
    if faults:
        raise ConfigError("; ".join(faults))
    return config


def check_lengths(config: FitConfig, num_partitions: int) -> None:
    """Check that the per-partition lists fit the number of partitions.

    Args:
        config: the run's configuration.
        num_partitions: of the plan.

    Raises:
        ConfigError: a list of another length.
    """
    if config.recovery_epochs:
        learners = recovering(config, num_partitions)
        if not learners or learners[-1] >= num_partitions:
            which = "is one partition, the last" if num_partitions == 1 else f"are {num_partitions} partitions"
            raise ConfigError(
                f"--recover {_shown(config.recover)}: there {which}; give numbers from 1 to {num_partitions}, or all"
            )
    for name, wanted in (
        ("epochs", num_partitions),
        ("batch_size", num_partitions),
        ("lr", num_partitions),
        ("kappa", num_partitions - 1),
    ):
        found = len(getattr(config, name))
        if found not in (1, wanted):
            what = "boundary" if name == "kappa" else "partition"
            plural = {"boundary": "boundaries"}.get(what, what + "s")
            raise ConfigError(
                f"{flag(name)} has {found} values, and there {'is' if wanted == 1 else 'are'} {wanted or 'no'} "
                f"{what if wanted == 1 else plural}; give one value{f' or {wanted}' if wanted > 1 else ''}, "
                "or set --cuts or --partitions"
            )


def recovering(config: FitConfig, num_partitions: int) -> tuple[int, ...]:
    """The partitions that learn in the recovery epochs, from 0, ascending.

    Args:
        config: the run's configuration.
        num_partitions: of the plan.

    Example:
        >>> recovering(configure(max_gpu_mem="2GB", recovery_epochs=1), num_partitions=3)
        (0, 1)
    """
    if config.recover == "all":
        return tuple(range(num_partitions))
    if config.recover is None:
        return tuple(range(num_partitions - 1))
    return tuple(sorted({number - 1 for number in config.recover}))


def check_device(config: FitConfig, on_cpu: bool, memory_bytes: int) -> None:
    """Check what can only be told once the device is known.

    Args:
        config: the run's configuration.
        on_cpu: the training device is the host.
        memory_bytes: of the host.

    Raises:
        ConfigError: an option that would have no effect there.
        BudgetError: on the CPU, a budget above the memory that there is.
    """
    if not on_cpu:
        return
    for name, need in (
        ("budget_scope", "a CUDA device"),
        ("max_host_mem", "a CUDA device (on the CPU, --max-gpu-mem is that bound)"),
    ):
        if getattr(config, name) not in (None, "process"):
            raise ConfigError(f"{flag(name)} has no effect here: it needs {need}, and this run is on the CPU; leave it out")
    if config.max_gpu_mem > memory_bytes:
        raise BudgetError(
            f"--max-gpu-mem {format_bytes(config.max_gpu_mem)} is more than this machine has, {format_bytes(memory_bytes)}; give less"
        )


def check_same(config: FitConfig, stored: FitConfig, where: Path) -> None:
    """Check that a run is resumed with the configuration that it began with.

    Args:
        config: what is asked now.
        stored: the run's.
        where: the run's folder, for the message.

    Raises:
        CheckpointError: they differ.
    """
    other = [name for name in field_names() if getattr(config, name) != getattr(stored, name)]
    if other:
        name = other[0]
        raise CheckpointError(
            f"the run in {where} began with {flag(name)} {getattr(stored, name)}, not {getattr(config, name)}; "
            "give the same to resume it, or begin a new run"
        )


def flag(name: str) -> str:
    """The command line's name of a field: `--max-gpu-mem` for `max_gpu_mem`."""
    return "--" + name.replace("_", "-")


def run_name(config: FitConfig) -> str:
    """A folder name for a run, from its model and method: letters, digits, '.', '_' and '-' alone.

    Example:
        >>> run_name(configure(max_gpu_mem="1GB", model="mlp:64-32-10", data="digits"))
        'mlp-64-32-10-pnn'
    """
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.model).name).strip("-.") or "model"
    return f"{model[:60]}-{config.method}"


def next_workdir(config: FitConfig, parent: Path = Path("runs")) -> Path:
    """The first folder `runs/MODEL-METHOD-N` that does not exist, N from 1."""
    number = 1
    while (path := parent / f"{run_name(config)}-{number}").exists():
        number += 1
    return path


def suggest(word: str, known: list[str]) -> str:
    """A tail for an error message: `; did you mean 'x'?`, or nothing if no known word is near."""
    near = difflib.get_close_matches(word.lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def field_names() -> list[str]:
    """The fields of `FitConfig`, in order."""
    return [field.name for field in dataclasses.fields(FitConfig)]


def _shown(value: Any) -> str:
    """A value as one would write it on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else "(all but the last)" if value is None else str(value)


def _absolute(name: str, value: Any) -> Any:
    """Paths in full: a run may be resumed from another folder than it was begun in."""
    if name == "data_root":
        return _full(value)
    if name not in ("model", "data") or not isinstance(value, str):
        return value
    kind, colon, path = value.partition(":")
    if name == "data" and kind in ("npz", "imagefolder", "text") and path:
        return f"{kind}:{_full(path)}"
    file, colon, factory = value.rpartition(":")
    return f"{_full(file)}{colon}{factory}" if file.endswith(".py") else value


def _full(path: str | Path) -> Path:
    # A user who is not known has no home: then `~name` is a folder's name, and will not be found.
    with suppress(RuntimeError):
        path = Path(path).expanduser()
    return Path(path).absolute()


def _describe(fault: Any) -> str:
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
    if fault["type"] == "too_short":
        return f"{flag(name)} {value!r} is empty; give one value, or one per partition"
    message = str(fault["msg"]).replace("Input should be", "must be").replace("Value error, ", "")
    return f"{flag(name)} {value!r}: {message[0].lower()}{message[1:]}"
