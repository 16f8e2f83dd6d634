"""What a run is asked to do: `FitConfig`, one frozen dataclass whose field descriptions are the command line's help.

No torch here: the command line reads this file to print its help.
"""

import dataclasses
import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveInt, TypeAdapter
from pydantic import ValidationError as PydanticError
from pydantic.dataclasses import dataclass

from lowmem_pnn.config.adapter_options import AdapterOptions, FrozenForm
from lowmem_pnn.config.data_options import DataOptions
from lowmem_pnn.config.faults import describe_fault
from lowmem_pnn.config.field_types import (
    Arguments,
    Batches,
    Clip,
    Counts,
    DeviceName,
    Flags,
    Layers,
    LearningRates,
    NotNegative,
    Optimizers,
    Positive,
    Recovering,
    Size,
)
from lowmem_pnn.config.finetuning_options import FineTuningOptions
from lowmem_pnn.config.language_options import LanguageOptions
from lowmem_pnn.config.local_options import LocalOptions
from lowmem_pnn.config.optimizer_options import OptimizerOptions
from lowmem_pnn.config.stopping_options import StoppingOptions
from lowmem_pnn.config.task_options import TaskOptions
from lowmem_pnn.errors import CheckpointError

LARGEST_AUTO_BATCH = 512
"""Above it a step gains no speed, and a small data set has few steps."""

MethodName = Literal["pnn", "neuroflux", "incubate", "exact", "backprop"]
METHODS: tuple[MethodName, ...] = ("pnn", "neuroflux", "incubate", "exact", "backprop")

PerPartition = Literal["epochs", "batch_size", "optimizer", "lr", "shuffle", "kappa"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FitConfig(
    DataOptions, LanguageOptions, TaskOptions, FineTuningOptions, AdapterOptions, StoppingOptions, OptimizerOptions, LocalOptions
):
    """Everything that decides a run, checked; the same values give the same run.

    Where a field is a tuple, one value holds for every partition, else there is one per partition.

    Raises:
        pydantic.ValidationError: with all faults at once. `configure` turns them into one `ConfigError`.
    """

    max_gpu_mem: Size = Field(
        description=(
            "Memory budget of the training device: the GPU, or this process where the device is the CPU (512MB, 2G, 2GiB); or a share of "
            "what is free at the start (75%), auto being 80%."
        )
    )
    model: str = Field(
        description=(
            "mlp:WIDTH-WIDTH-..., gpt:layers=N,width=N,heads=N,context=N, cifar-resnet18, cifar-vgg11, cifar-vgg16, "
            "cifar-mobilenetv2, a torchvision name, timm:NAME, hf:DIR, hf:CONFIG.json, hf:NAME, package.module:factory, or "
            "file.py:factory."
        )
    )
    model_arg: Arguments = Field(
        default_factory=dict, description="An argument for the model's factory, as KEY=VALUE; may be repeated."
    )
    method: MethodName = Field(
        default="pnn",
        description=(
            "Training method. pnn: partitions one after the other, each on synthetic intermediate labels. neuroflux: blocks one after "
            "the other, every layer with an auxiliary head and a loss of its own. incubate: partitions one after the other, each inside a "
            "thin model of the whole. exact: ordinary training, one partition on the device at a time. backprop: ordinary training, the "
            "whole model on the device. Take backprop where it fits, exact where it does not; of the others, "
            "incubate came out best where measured, on one small network with few settings tried."
        ),
    )
    partitions: PositiveInt | None = Field(
        default=None, description="Number of partitions; chosen by the planner if neither this nor --cuts is given."
    )
    cuts: Layers = Field(
        default=None, description="Layers that each start a new partition, by name or by number from 0, separated by commas."
    )
    epochs: Counts = Field(default=(10,), description="Number of epochs: one value, or one per partition.")
    batch_size: Batches = Field(
        default=(64,),
        description=(
            "Samples per optimizer step: one value, or one per partition. auto (pnn, neuroflux): as many as fit at once, partition by "
            "partition, up to 512 or to the power of two that gives the tightest one most; --lr is then meant for 64."
        ),
    )
    micro_batch: PositiveInt | None = Field(
        default=None,
        description="Largest number of samples on the device at once (gradient accumulation); by default the largest that fits.",
    )
    plan_for: Literal["auto", "size", "time"] = Field(
        default="auto",
        description=(
            "Goal of the planner. size: fewest partitions. time: shortest predicted training, after timing each layer. auto: size; "
            "for --method exact, shortest by built-in estimates (same on every machine)."
        ),
    )
    optimizer: Optimizers = Field(default=("adamw",), description="Optimizer: one value, or one per partition.")
    lr: LearningRates = Field(default=(1e-3,), description="Learning rate: one value, or one per partition.")
    lr_schedule: Literal["constant", "linear", "cosine", "onecycle"] = Field(
        default="constant", description="Schedule of the learning rate over the steps."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Steps over which the learning rate first rises to --lr (constant, linear, cosine)."
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.9, description="Momentum of sgd.")
    weight_decay: NotNegative = Field(default=0.0, description="Weight decay.")
    shuffle: Flags = Field(
        default=(True,),
        description="Whether to shuffle the training samples anew in every epoch: one value, or one per partition.",
    )
    fused: bool = Field(
        default=True, description="Use PyTorch's fused optimizers: faster and without temporary tensors; last bits differ."
    )
    step_in_backward: bool = Field(
        default=True,
        description=(
            "Step each layer's weights during backward, as soon as its gradients are complete, so that only one layer's gradients are "
            "in memory; only where a batch goes through at once."
        ),
    )
    recompute: Literal["auto", "always", "never"] = Field(
        default="auto",
        description=(
            "Sweeps: whether matrix products, convolutions and attention of the first forward are computed again for the backward, or "
            "kept in a file. auto: where that is faster, by built-in estimates, and within --max-disk and nine tenths of the free disk."
        ),
    )
    optimizer_state: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32",
        description=(
            "Type of the state of adam and adamw, in memory and on disk, for parameters of 4096 elements or more: fp32 (8 bytes per "
            "element), bf16 with stochastic rounding (4), or int8 in blocks with a scale each (2; needs torchao)."
        ),
    )
    clip_norm: Clip = Field(
        default=None,
        description=(
            "Gradient clipping: norm that gradients are scaled down to, over all weights (exact, backprop), the weights of a partition "
            "(pnn, incubate), or those of a layer (neuroflux); 0 for none."
        ),
    )
    loss_chunk: PositiveInt | None = Field(
        default=None,
        description=(
            "Rows (samples, or tokens of text) for which the last layer and the loss are computed at once; by default all of a "
            "micro-batch, or fewer where the last layer is wide."
        ),
    )
    recovery_epochs: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Epochs after training in which some partitions learn on by exact gradients, through the others, which are frozen.",
    )
    recover: Recovering = Field(
        default=None,
        description=(
            "Partitions that learn in the recovery epochs, by number from 1, separated by commas; by default all but the last "
            "(incubate: all), and one that is alone."
        ),
    )
    kappa: LearningRates = Field(
        default=(10.0,), description="Scale of the synthetic intermediate labels: one value, or one per boundary."
    )
    sil: Literal["uniform", "normal", "orthogonal", "sparse"] = Field(
        default="uniform",
        description=(
            "Distribution of the synthetic intermediate labels. uniform: kappa * U(0, 1), as in the paper. normal, orthogonal: with the "
            "same mean and deviation. sparse: a fifth of the elements are kappa, the others 0, as after a ReLU."
        ),
    )
    sil_target: Literal["full", "pooled"] = Field(
        default="full",
        description=(
            "Outputs that the synthetic labels are compared with. full: a boundary's whole tensors. pooled: their means over positions, "
            "one value per channel or feature."
        ),
    )
    parallel_sil: bool = Field(
        default=False,
        description=(
            "Train partitions independently of each other, from the synthetic labels of one boundary to those of the next; under "
            "torchrun side by side, one process each."
        ),
    )
    views: PositiveInt = Field(
        default=1,
        description="Augmented copies of block outputs, one for each epoch (neuroflux, incubate). 1: from block 2 on, as samples are.",
    )
    blocks: Literal["planner", "alike"] = Field(
        default="planner",
        description=(
            "How blocks are found. planner: as few as fit with a good micro-batch. alike: neighbouring layers that can take about the "
            "same batch size, as in the paper."
        ),
    )
    block_tolerance: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.5, description="Largest difference between batch sizes in a block, as a share of the largest (--blocks alike)."
    )
    heads: Literal["adaptive", "classic", "auglocal", "linear"] = Field(
        default="adaptive",
        description=(
            "Kind of auxiliary heads. adaptive: fewer filters where feature maps are large. classic: 256 filters everywhere. auglocal: "
            "shaped like later layers. linear: mean and a linear layer."
        ),
    )
    exit_tolerance: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.01,
        description=(
            "How far below the best exit's validation accuracy the chosen exit may be; the smallest such exit is taken. Where samples have "
            "several labels: by which share its validation loss may be above the least."
        ),
    )
    activation_dtype: Literal["float32", "bfloat16", "float16", "int8"] = Field(
        default="float32",
        description=(
            "Type of boundary activations on disk while partitions learn from them (pnn, neuroflux, incubate). float32: as they are. int8: "
            "with a scale per channel or token."
        ),
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="Seed of the initial weights, the data order and all other random choices."
    )
    device: DeviceName = Field(
        default="auto", description="Training device: cpu, cuda or cuda:INDEX; auto takes a GPU where there is one."
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32",
        description=(
            "Mixed precision: type that layers compute in under PyTorch's autocast, fp16 with a dynamic loss scale; weights and their "
            "gradients stay float32 (but --weights-dtype)."
        ),
    )
    tf32: bool = Field(
        default=False,
        description=(
            "On a GPU of compute capability 8.0 or later, multiply matrices of fp32 in TF32, with 10 bits of mantissa: faster; "
            "PyTorch's default has it for convolutions alone."
        ),
    )
    channels_last: bool = Field(
        default=False,
        description="Keep feature maps (B, C, H, W) in channels-last memory format: convolutions may be faster; last bits differ.",
    )
    compile: bool = Field(
        default=False,
        description=(
            "Compile layers with PyTorch's compiler before training, once for all layers with the same program (CPU; needs a C++ "
            "compiler); last bits differ."
        ),
    )
    batch_norm: Literal["micro", "refuse"] = Field(
        default="micro",
        description=(
            "What BatchNorm layers, and modules of one's own that mix samples, see where a batch goes through in several micro-batches. "
            "micro: each micro-batch, which is said. refuse: the whole batch, or nothing is trained."
        ),
    )
    compare: bool = Field(
        default=True,
        description=(
            "Before training, compare the model's outputs, loss, gradients and buffers on a few samples with those of the model in "
            "layers, and find modules that mix samples."
        ),
    )
    budget_scope: Literal["process", "allocator"] = Field(
        default="process",
        description="What the budget bounds on a GPU: all device memory of the process, or that of PyTorch's allocator alone.",
    )
    max_host_mem: Size | None = Field(
        default=None, description="Bound on host memory above what the process starts with (GPU runs)."
    )
    host_tier: bool = Field(
        default=True,
        description=(
            "For --method exact on a GPU: keep weights and optimizer state in host memory between commits, as far as half of "
            "--max-host-mem, or of what is available, holds them."
        ),
    )
    max_disk: Size | None = Field(default=None, description="Bound on the size of the run's folder.")
    drive_tbw: Positive | None = Field(
        default=None,
        description="Terabytes that the drive may be written in its life, by its data sheet: plan and result say which share a run takes.",
    )
    commit_every: NotNegative = Field(default=60.0, description="Least seconds between two commits to the run's folder.")
    keep_commits: PositiveInt = Field(default=1, description="Number of commits kept in the run's folder.")
    log_every: PositiveInt = Field(default=100, description="Optimizer steps between two lines of metrics.jsonl.")
    logger: Literal["none", "tensorboard", "wandb", "mlflow"] = Field(
        default="none",
        description=(
            "Where metrics are logged beside metrics.jsonl: tensorboard (files in the run's folder), wandb or mlflow (as their own "
            "variables say, such as WANDB_MODE=offline)."
        ),
    )

    def value_for(self, field: PerPartition, partition: int) -> Any:
        """Return one partition's value of a field that may have one per partition.

        Args:
            field: name of the field.
            partition: number of the partition, from 0.

        Returns:
            The partition's own value, or the only one.
        """
        values = getattr(self, field) if field != "batch_size" else self.batch_sizes
        return values[0] if len(values) == 1 else values[partition]

    @property
    def frozen_form(self) -> FrozenForm:
        """Type that frozen weights are kept in."""
        return self.frozen_dtype or ("bf16" if self.lora is not None and self.precision == "bf16" else "fp32")

    @property
    def num_meta_epochs(self) -> int:
        """Epochs of the meta model."""
        return self.meta_epochs or max(self.epochs)

    @property
    def steps_wait(self) -> bool:
        """Whether steps wait until all gradients of a batch are there: to clip their norm, or since any of them may overflow.

        Layers that learn by losses of their own (neuroflux) are clipped one by one, and need not wait.
        """
        return (self.clip_norm is not None and self.method != "neuroflux") or self.precision == "fp16"

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Samples per step as far as they are known before the plan: with `auto` the most that it may choose."""
        return (LARGEST_AUTO_BATCH,) if self.batch_size == "auto" else self.batch_size

    def to_json(self) -> str:
        """Return the configuration as JSON text, which `from_json` reads back."""
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
            faults = "; ".join(
                describe_fault(fault, field_names()) if fault["loc"] else str(fault["msg"]) for fault in error.errors()
            )
            raise CheckpointError(
                f"the run's config.json is not one that this version wrote ({faults}); resume with the version that wrote it"
            ) from None


def recovering(config: FitConfig, num_partitions: int) -> tuple[int, ...]:
    """Return the partitions that learn in the recovery epochs, from 0, ascending.

    Args:
        config: options of the run.
        num_partitions: partitions of the plan.

    Example:
        >>> recovering(FitConfig(max_gpu_mem="2GB", model="mlp:4-4-2", data="digits", recovery_epochs=1), num_partitions=3)
        (0, 1)
        >>> recovering(FitConfig(max_gpu_mem="2GB", model="mlp:4-4-2", data="digits", recovery_epochs=1), num_partitions=1)
        (0,)
    """
    if config.recover == "all" or (config.recover is None and config.method == "incubate"):
        return tuple(range(num_partitions))
    if config.recover is None:
        return tuple(range(max(1, num_partitions - 1)))
    return tuple(sorted({number - 1 for number in config.recover}))


def field_names() -> list[str]:
    """Return the fields of `FitConfig`, in order."""
    return [field.name for field in dataclasses.fields(FitConfig)]


def default_of(name: str) -> Any:
    """Return what a field of `FitConfig` is where nobody gives it.

    Args:
        name: name of the field.
    """
    info: Any = next(field for field in dataclasses.fields(FitConfig) if field.name == name).default  # pydantic's
    return info.get_default(call_default_factory=True)
