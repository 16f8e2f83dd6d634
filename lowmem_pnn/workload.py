"""A workload: what a configuration comes to once its model is cut into layers and its data is open. Nothing is allocated yet."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.device import Device, is_out_of_memory
from lowmem_pnn.errors import ConfigError, LowMemError
from lowmem_pnn.methods import Method, Objective, make_method
from lowmem_pnn.methods.base import SplitName
from lowmem_pnn.model.chain import Chain, TensorSpec, capture
from lowmem_pnn.model.compiler import Compiler, Use
from lowmem_pnn.model.layer import is_rowwise
from lowmem_pnn.model.precision import Precision
from lowmem_pnn.optim.low_precision import SMALLEST, is_quantized
from lowmem_pnn.optim.lr_schedules import factor
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.profiling.profiler import Known, profile
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.sources.datasets import Dataset, Split, find_dataset, subset, train_val
from lowmem_pnn.sources.deferred_init import skeleton
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.sources.models import ModelSource, find_model

# What `lr` is meant for where the batch is chosen: the default batch size.
_BATCH_OF_LR = 64


@dataclass(frozen=True)
class Workload:
    """Model, data and method of a run.

    Args:
        config: what was asked.
        source: how the model is built.
        dataset: where samples come from.
        splits: its parts: `train`, and `val` and `test` where there are such.
        method: the training method.
        chain: the model in layers; its tensors are on the meta device until they are resident.
        bare: the same without auxiliary heads.
        compiled: `layers`, `functions` that they share, and the `seconds` it took to compile them; empty where they run as they are.
    """

    config: FitConfig
    source: ModelSource
    dataset: Dataset
    splits: dict[SplitName, Split]
    method: Method
    chain: Chain
    bare: Chain
    compiled: Mapping[str, float] = field(default_factory=dict)

    @property
    def rows_per_sample(self) -> int:
        """Labels of one sample: 1, or its tokens."""
        return math.prod(self.dataset.label_shape)

    @property
    def training_splits(self) -> dict[SplitName, int]:
        """The parts that training reads, and their samples."""
        return {name: len(self.splits[name]) for name in ("train", "val") if name in self.splits}

    def optimizer(self, partition: int) -> OptimizerSpec:
        """A partition's optimizer."""
        config = self.config
        return OptimizerSpec(
            config.value_for("optimizer", partition),
            config.value_for("lr", partition),
            config.momentum,
            config.weight_decay,
            config.fused,
            config.optimizer_state,
            config.seed,
        )

    def learning_rate(self, partition: int, step: int, total_steps: int, batch: int | None = None) -> float:
        """A partition's learning rate.

        Where the batch is `auto`, `lr` is meant for 64 samples, and follows the batch: in proportion with sgd (Goyal et al. 2017,
        section 2.1), as its square root with adam and adamw (Malladi et al. 2022).

        Args:
            partition: its number.
            step: optimizer steps before this one, from 0.
            total_steps: of the training that the schedule stretches over.
            batch: samples a step; None where it is as asked.
        """
        config = self.config
        rate: float = config.value_for("lr", partition)
        if config.batch_size == "auto" and batch is not None:
            share = batch / _BATCH_OF_LR
            rate *= share if config.value_for("optimizer", partition) == "sgd" else math.sqrt(share)
        return rate * factor(config.lr_schedule, step, total_steps, config.warmup_steps)

    def objective(self, plan: Plan, partition: int) -> Objective:
        """What a partition learns."""
        boundary = self.chain.boundaries[plan.partitions[partition].stop]
        return self.method.objective(partition, len(plan.partitions), boundary, self.dataset.num_classes)

    def head(self, number: int) -> nn.Module | None:
        """The auxiliary head of a layer, as drawn after `torch.manual_seed(seed_of(config.seed, "head", number))`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.config.seed, "head", number))
            return self.method.head(self.chain, number, self.dataset.num_classes, bool(self.dataset.label_shape))

    def build_model(self, seed: int) -> nn.Module:
        """The model with the values that its constructor gives it after `torch.manual_seed(seed)`."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.source.build()


def open_data(config: FitConfig) -> tuple[ModelSource, Dataset, dict[SplitName, Split]]:
    """Find the model's factory and open the data: what a user may have misspelt, and what belongs to the floor.

    Args:
        config: what was asked.

    Raises:
        ConfigError: no such model, data set, or argument.
        DataError: the data cannot be trained on.
    """
    # The data set says how many classes the model gets; the model how images are to be shown to it, and how long a text.
    named = find_model(config.model, config.model_arg, None)
    dataset = find_dataset(config.data, config.data_root, named.wants, context=named.context)
    source = find_model(config.model, config.model_arg, dataset.num_classes)
    return source, dataset, split_data(dataset, config)


def split_data(dataset: Dataset, config: FitConfig) -> dict[SplitName, Split]:
    """Training, validation and test parts of a data set."""
    train, val = train_val(dataset.train, config.val_fraction, seed_of(config.seed, "split"), config.train_limit)
    splits: dict[SplitName, Split] = {"train": train}
    if val is not None:
        splits["val"] = val
    if dataset.test is not None:
        size = min(len(dataset.test), config.test_limit or len(dataset.test))
        splits["test"] = subset(dataset.test, torch.arange(size).numpy())
    elif config.test_limit is not None:
        raise ConfigError(f"--test-limit has no effect here: data {config.data} has no test part; leave it out")
    return splits


def make_workload(
    config: FitConfig, source: ModelSource, dataset: Dataset, splits: dict[SplitName, Split], device: torch.device
) -> Workload:
    """Cut the model into layers, without its weights.

    Args:
        config: what was asked.
        source: how the model is built.
        dataset: open.
        splits: its parts.
        device: that will compute; what autocast casts differs between devices.

    Raises:
        CaptureError: the model cannot be cut.
        ConfigError: model and data do not fit together.
    """
    try:
        model = skeleton(source.build)
    except Exception as error:
        if isinstance(error, LowMemError) or is_out_of_memory(error):
            raise
        raise ConfigError(f"model {source.spec} cannot be built: {one_line(error)}; see to its constructor") from error
    if not _learning(model):
        raise ConfigError(f"model {source.spec} has no parameters to train; give one with weights that require gradients")
    _check_input(source, dataset, model)
    precision = Precision(config.precision, device.type, config.channels_last)
    chain = capture(model, TensorSpec(dataset.sample_shape, dataset.dtype), precision)
    if config.channels_last and all(parameter.dim() != 4 for parameter in model.parameters()):
        raise ConfigError(
            f"--channels-last has no effect here: {source.spec} has no convolutions of maps (C, H, W); leave it out"
        )
    if config.optimizer_state != "fp32" and not any(map(is_quantized, _learning(model))):
        raise ConfigError(
            f"--optimizer-state {config.optimizer_state} has no effect here: {source.spec} has no float32 parameters of {SMALLEST} elements "
            "or more that learn; leave it out"
        )
    (scores,) = chain.boundaries[-1]
    if scores.shape[:-1] != dataset.label_shape or scores.shape[-1] < dataset.num_classes:
        wanted = ", ".join(["batch", *map(str, dataset.label_shape), str(dataset.num_classes)])
        raise ConfigError(
            f"model {source.spec} gives outputs of shape (batch, {', '.join(map(str, scores.shape))}), and data {dataset.name} has "
            f"{dataset.num_classes} classes; it should give ({wanted}), or more scores than that"
        )
    if config.augment != "none" and (len(dataset.sample_shape) != 3 or not dataset.dtype.is_floating_point):
        raise ConfigError(
            f"--augment {config.augment} is for images (C, H, W), and the samples of data {dataset.name} are {dataset.sample_shape}; leave "
            "it out"
        )
    workload = _by_method(Workload(config, source, dataset, splits, make_method(config), chain, chain))
    if config.loss_chunk is not None and not is_rowwise(chain.layers[-1]):
        raise ConfigError(
            f"--loss-chunk {config.loss_chunk}: the last layer of {source.spec}, {chain.layers[-1].name!r}, is not one nn.Linear and "
            "cannot be computed in parts; leave it out"
        )
    return workload


def _learning(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def by_other_method(workload: Workload, config: FitConfig) -> Workload:
    """The same model and data, cut already, by another method.

    Args:
        workload: of some method.
        config: the same but for the method, and what depends on it.

    Raises:
        ConfigError: the method cannot train this.
    """
    return _by_method(dataclasses.replace(workload, config=config, method=make_method(config), chain=workload.bare))


def _by_method(workload: Workload) -> Workload:
    """A workload that its method can train, with the heads that it learns from."""
    if workload.dataset.label_shape and workload.config.method == "pnn":
        raise ConfigError(
            f"--method pnn needs a class for each sample, and data {workload.dataset.name} has one for each token; use --method exact"
        )
    return dataclasses.replace(workload, chain=_with_heads(workload)) if workload.method.learns_per_layer else workload


def with_compiled_layers(workload: Workload, device: torch.device) -> Workload:
    """The workload, its layers compiled for all that a run does with them.

    Args:
        workload: with `--compile`.
        device: that will compute.

    Raises:
        ConfigError: a layer cannot be compiled.
    """
    config = workload.config
    most = min(max(config.batch_sizes), config.micro_batch or max(config.batch_sizes))
    compiler = Compiler(range(min(2, most), most + 1), device)
    for number, layer in enumerate(workload.chain.layers):
        compiler.compile(layer, workload.chain.boundaries[number], [*_training_uses(workload, number), Use(trains=False)])
    counted = {"layers": len(workload.chain.layers), "functions": compiler.num_functions, "seconds": compiler.seconds}
    return dataclasses.replace(workload, compiled=counted)


def _training_uses(workload: Workload, number: int) -> list[Use]:
    """How a layer is trained: its inputs have gradients, unless they are the model's, a partition's that learns alone, or a unit's."""
    config, method = workload.config, workload.method
    if number == 0:
        return [Use(trains=True)]
    if method.sweeps or config.method == "backprop":
        inside, first = True, False
    elif method.learns_per_layer:
        inside, first = config.recovery_epochs > 0, True
    else:
        # Without cuts the plan, which is made later, says where partitions begin.
        begins = {workload.chain.layer_index(cut) for cut in config.cuts or ()}
        first = config.cuts is None or number in begins
        inside = number not in begins or config.recovery_epochs > 0
    return [Use(trains=True, learns_input=learns) for learns, wanted in ((True, inside), (False, first)) if wanted]


def _with_heads(workload: Workload) -> Chain:
    """The chain with a head at every layer that has no class scores of its own; their weights are on the meta device."""
    chain, layers = workload.chain, []
    for number, layer in enumerate(chain.layers):
        after = chain.boundaries[number + 1]
        if len(after) > 1 or not after[0].dtype.is_floating_point:
            found = ", ".join(map(str, after))
            raise ConfigError(
                f"--method neuroflux needs layers that hand on one tensor each, and {layer.name!r} of {workload.source.spec} hands on "
                f"{found}; use --method exact"
            )
        with torch.device("meta"):
            head = workload.head(number)
        layers.append(layer if head is None else layer.with_head(head, number))
    return dataclasses.replace(chain, layers=tuple(layers))


def _check_input(source: ModelSource, dataset: Dataset, model: nn.Module) -> None:
    """Refuse the commonest ways in which a model does not take the samples, in words that say what to write."""
    widths = source.spec.removeprefix("mlp:").split("-")
    if source.spec.startswith("mlp:") and dataset.sample_shape != (int(widths[0]),):
        size = math.prod(dataset.sample_shape)
        raise ConfigError(
            f"model {source.spec} takes {widths[0]} values, and the samples of data {dataset.name} have {size}; "
            f"write mlp:{'-'.join([str(size), *widths[1:]])}"
        )
    if source.context is not None and (dataset.dtype != torch.int64 or dataset.sample_shape[0] > source.context):
        found = f"{dataset.sample_shape} {str(dataset.dtype).removeprefix('torch.')}"
        raise ConfigError(
            f"model {source.spec} takes up to {source.context} tokens (int64), and the samples of data {dataset.name} are {found}; give "
            f"--data text:FILE, or tokens of shape ({source.context},)"
        )
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(dtypes) == 1 and dataset.dtype.is_floating_point and dataset.dtype not in dtypes:
        found = str(dtypes.pop()).removeprefix("torch.")
        raise ConfigError(f"model {source.spec} has {found} weights, and samples are float32; have it built with model.float()")


def profile_workload(workload: Workload, device: Device, known: Known | None = None) -> MemoryProfile:
    """What each layer needs, by fake tensors: nothing is allocated. Of several optimizers the largest is counted for all.

    Args:
        workload: cut into layers.
        device: that will compute.
        known: what profiles of the same model by other methods found.
    """
    config = workload.config
    optimizers = [
        OptimizerSpec(
            name, momentum=config.momentum, weight_decay=config.weight_decay, fused=config.fused, state=config.optimizer_state
        )
        for name in config.optimizer
    ]
    return profile(
        workload.chain,
        optimizers=optimizers,
        device=device.torch_device,
        parts_ties=workload.method.sweeps,
        per_layer_loss=workload.method.learns_per_layer,
        known=known,
    )
