"""Assembly: model, data and method put together as a workload, or refused in words where they do not fit together."""

import dataclasses
import math
from collections.abc import Collection
from contextlib import nullcontext, suppress

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lowmem_pnn.adapters.prepared_model import adapter_tensor_names, new_modules, prepared
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.capture.setting import numbers_of_samples
from lowmem_pnn.capture.stored_reads import StoredReadError
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.language_options import LANGUAGE_KINDS
from lowmem_pnn.device import Device, is_out_of_memory
from lowmem_pnn.errors import CaptureError, ConfigError, LowMemError
from lowmem_pnn.language.next_tokens import fit_labels
from lowmem_pnn.language.open_language import fit_inputs
from lowmem_pnn.methods import SplitName, make_method
from lowmem_pnn.model.call_form import CallForm
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.model.precision import Precision
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.pretrained.matching import PretrainedWeights, match
from lowmem_pnn.pretrained.transformers_weights import TransformersWeights
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.profiling.memory_profiler import MeasurementCache, profile
from lowmem_pnn.samples.epochs import as_epochs
from lowmem_pnn.seeds import seeded
from lowmem_pnn.sources.dataset import Dataset
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.sources.subsets import as_floats
from lowmem_pnn.tasks.class_weights import balanced_weights
from lowmem_pnn.tasks.make_task import OUTPUT_NAMES, Own, make_task
from lowmem_pnn.workload.integer_functions import RefusesFloatsForIntegers
from lowmem_pnn.workload.option_checks import (
    check_effects,
    check_epochs,
    check_loss_chunk,
    check_mixing,
    check_validations,
    try_own,
)
from lowmem_pnn.workload.workload import Workload
from lowmem_pnn.zoo.deferred_init import skeleton
from lowmem_pnn.zoo.model_source import ModelSource

_INSTEAD_OF_CLASS = {
    "tokens": "one for each token", "mask": "one for each pixel", "labels": "several labels for each", "values": "numbers to predict",
    "probabilities": "probabilities", "own": "targets for a loss of your own",
}  # fmt: skip


def make_workload(
    config: FitConfig,
    source: ModelSource,
    dataset: Dataset,
    splits: dict[SplitName, Split],
    own: Own,
    device: torch.device,
    unstored: Collection[str] = (),
) -> Workload:
    """Cut the model into layers, without its weights.

    Args:
        config: options of the run.
        source: constructor of the model.
        dataset: open data set.
        splits: parts of the data set.
        own: loss and metrics of the user's own.
        device: training device; what autocast casts differs between devices.
        unstored: modules whose weights are kept as they are (`Workload.unstored`), as far as is known.

    Raises:
        CaptureError: the model cannot be cut.
        ConfigError: model and data, or the model and the pretrained weights, do not fit together.
    """
    opened = dataset, splits  # as they are, before the model tells what of integers are numbers
    built = _built(source, config)
    # What is drawn, or converted, is thrown away below.
    with seeded(config.seed):
        model = prepared(built, config, unstored=unstored, with_values=False)
        early = None
        if config.unfreeze_at is not None:
            early = prepared(built, config, early=True, unstored=unstored, with_values=False)
    if not _trainable(model):
        raise ConfigError(f"model {source.spec} has no parameters to train; give one with weights that require gradients")
    batch = config.value_for("batch_size", 0) if config.drop_last else None
    splits = {**splits, "train": as_epochs(splits["train"], batch, dataset.sampler)}
    config = _of_max_steps(config, len(splits["train"]))
    dataset, splits = fit_labels(model, source.spec, *fit_inputs(model, source.spec, dataset, splits))
    _check_input(source, dataset, model)
    _check_head(source, config, dataset)
    precision = Precision(config.precision, device.type, config.channels_last)
    learns_from = () if own.loss is not None else OUTPUT_NAMES
    try:
        chain, dataset, splits = _capture(config, model, source, dataset, splits, precision, learns_from)
    except StoredReadError as error:
        return make_workload(config, source, *opened, own, device, {*unstored, *error.names})
    chain.drop_values()  # of a model that could not be built without them
    check_effects(config, model, source.spec)
    task = make_task(config, dataset.targets, own, chain, _class_weights(config, dataset, splits["train"]))
    outputs = chain.boundaries[-1]
    if (misfit := task.misfit(outputs)) is not None:
        shapes = " and ".join(f"({', '.join(map(str, ('batch', *spec.shape)))})" for spec in outputs)
        raise ConfigError(f"model {source.spec} gives outputs of shape {shapes}, and data {dataset.name} has {misfit}")
    if config.mixing is not None:
        check_mixing(config, dataset)
    try_own(task, splits["train"], outputs)
    check_validations(config, task, outputs, dataset, splits)
    pretrained = _pretrained(source, chain, built)
    if config.lora is not None and pretrained is not None and (heads := new_modules(pretrained.new_names, chain)):
        # A head with random values has to learn, beside adapters too.
        if config.modules_to_save is None:
            config = dataclasses.replace(config, modules_to_save=tuple(heads))
            return make_workload(config, source, *opened, own, device, unstored)
        raise ConfigError(
            f"--modules-to-save {','.join(config.modules_to_save)}: {heads[0]!r} is new, and would never learn; name it too, or leave "
            "the option out"
        )
    workload = Workload(
        config, source, dataset, splits, make_method(config), task, chain, chain, pretrained, unstored=frozenset(unstored)
    )
    workload = _by_method(workload)
    if early is not None:
        if state := chain.python_state:
            raise ConfigError(
                f"--unfreeze-at: a forward changes {next(iter(state))!r}, which two ways of training would each have; leave it out"
            )
        frozen = capture(early, chain.boundaries[0], precision, chain.call_form, learns_from, _occurring(config, splits))
        frozen.drop_values()
        first = dataclasses.replace(workload, chain=frozen, bare=frozen, parts=None)
        workload = dataclasses.replace(workload, early=_by_method(first))
    workload.check_rates()
    _ = workload.without_decay  # patterns are checked before anything is made
    check_loss_chunk(config, task, chain, source.spec)
    return workload


def _built(source: ModelSource, config: FitConfig) -> nn.Module:
    """Build the model without values."""
    try:
        return skeleton(source.build, seed=config.seed)
    except Exception as error:
        if isinstance(error, LowMemError) or is_out_of_memory(error):
            raise
        raise ConfigError(f"model {source.spec} cannot be built: {one_line(error)}; see to its constructor") from error


def _pretrained(source: ModelSource, chain: Chain, built: nn.Module) -> PretrainedWeights | None:
    """Match the weights that training begins with, by the names that the model's own loader knows."""
    weights, beside = source.weights, adapter_tensor_names(chain.modules())
    if weights is None:
        return None
    if not isinstance(weights, TransformersWeights):
        return match(weights, chain, source.spec, beside, loader=built)
    return match(weights, chain, source.spec, beside, weights.may_be_new, head_may_be_new=weights.head_may_be_new)


def _of_max_steps(config: FitConfig, samples: int) -> FitConfig:
    """Return the options with the epochs that `--max-steps` leaves, the last of which may end early."""
    if config.max_steps is None:
        return config
    per_epoch, epochs = math.ceil(samples / config.value_for("batch_size", 0)), config.value_for("epochs", 0)
    if config.max_steps > epochs * per_epoch:
        raise ConfigError(
            f"--max-steps {config.max_steps:,}: {epochs} epoch{'s' if epochs > 1 else ''} of {samples:,} samples have {epochs * per_epoch:,} "
            f"steps; give --epochs {math.ceil(config.max_steps / per_epoch)}, or fewer steps"
        )
    left = math.ceil(config.max_steps / per_epoch)
    if config.unfreeze_at is not None and config.unfreeze_at >= left:
        raise ConfigError(
            f"--unfreeze-at {config.unfreeze_at}: --max-steps {config.max_steps:,} ends training in epoch {left - 1}, counted from 0; give more "
            "steps"
        )
    return dataclasses.replace(config, epochs=(left,))


def _occurring(config: FitConfig, splits: dict[SplitName, Split]) -> tuple[int, ...]:
    """Return numbers of samples that may go through the model at once."""
    return numbers_of_samples(config.batch_sizes, [len(split) for split in splits.values()])


def _capture(
    config: FitConfig,
    model: nn.Module,
    source: ModelSource,
    dataset: Dataset,
    splits: dict[SplitName, Split],
    precision: Precision,
    learns_from: tuple[str, ...],
) -> tuple[Chain, Dataset, dict[SplitName, Split]]:
    """Cut the model for the samples of a data set, whose integers become float32 where the model calculates with them.

    Integers are tokens for a model that looks them up, and numbers for any other, and only the model tells. An embedding refuses float32
    on fake tensors, where a linear layer would take int64: so float32 is tried first.
    """
    batches = _occurring(config, splits)
    if dataset.structure is not None:
        options = [
            flag for flag, given in (("--augment", config.augment != "none"), ("--image-size", config.image_shape)) if given
        ]
        if options:
            raise ConfigError(f"{options[0]}: samples of data {dataset.name} are several tensors; prepare them in the data set")
        example = pytree.tree_unflatten([torch.empty(spec.shape, dtype=spec.dtype) for spec in dataset.inputs], dataset.structure)
        return capture(model, dataset.inputs, precision, CallForm.of(example, model), learns_from, batches), dataset, splits

    def cut(shape: tuple[int, ...], dtype: torch.dtype) -> Chain:
        is_guess = dtype != dataset.dtype
        with RefusesFloatsForIntegers() if is_guess else nullcontext():
            return capture(model, TensorSpec(shape, dtype), precision, None, learns_from, batches)

    shape, dtypes = dataset.sample_shape, [dataset.dtype]
    if source.input_form == "any" and source.context is None and dataset.may_be_numbers:
        dtypes = [torch.float32, torch.int64]
    errors: list[CaptureError] = []
    for dtype in dtypes:
        try:
            chain = cut(shape, dtype)
        except CaptureError as error:
            errors.append(error)
            continue
        if dtype == dataset.dtype:
            return chain, dataset, splits
        return chain, dataset.as_floats(), {name: as_floats(split) for name, split in splits.items()}
    if len(shape) > 1 and (turned := (shape[-1], *shape[:-1])) != shape:
        with suppress(CaptureError):
            capture(model, TensorSpec(turned, dtypes[0]), precision)
            axes = (0, len(shape), *range(1, len(shape)))
            raise ConfigError(
                f"model {source.spec} does not take the samples of data {dataset.name}, which are {shape}, and takes {turned}: store "
                f"channels first, as by x.transpose{axes} of an array (batch, {', '.join(map(str, shape))})"
            )
    # Of two refusals the one that says more: what comes after running, then that of the type which the model looks like.
    looks_up = any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules())
    raise next((error for error in errors if "does not run on" not in str(error)), errors[-1 if looks_up else 0])


def _class_weights(config: FitConfig, dataset: Dataset, train: Split) -> tuple[float, ...] | None:
    """Return the weights of the classes that the options ask for."""
    if config.class_weights is None or dataset.targets.kind not in ("class", "tokens", "mask", "labels"):
        if config.class_weights is not None and dataset.targets.kind == "probabilities":
            raise ConfigError("--class-weights has no meaning for probabilities of classes; leave it out")
        return None
    if config.class_weights == "balanced":
        return balanced_weights(train, dataset.targets)
    if len(config.class_weights) != dataset.num_classes:
        raise ConfigError(
            f"--class-weights has {len(config.class_weights)} values, and data {dataset.name} has {dataset.num_classes} classes; give one "
            "for each, or balanced"
        )
    return config.class_weights


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def by_other_method(workload: Workload, config: FitConfig) -> Workload:
    """Return the workload of another method, with the same model, cut already, and the same data.

    Args:
        workload: workload of some method.
        config: the same options but for the method, and what depends on it.

    Raises:
        ConfigError: the method cannot train this.
    """
    chain = workload.parts or workload.bare
    early = None if workload.early is None else by_other_method(workload.early, config)
    other = dataclasses.replace(workload, config=config, method=make_method(config), early=early)
    return _by_method(dataclasses.replace(other, chain=chain, bare=chain, parts=None))


def _by_method(workload: Workload) -> Workload:
    """Return a workload with the auxiliary heads that its method learns from, if its method can train it.

    Methods that give partitions losses of their own cut between blocks, where one tensor flows.
    """
    check_epochs(workload)
    kind = workload.dataset.targets.kind
    if kind != "class" and workload.config.method == "pnn":
        raise ConfigError(
            f"--method pnn needs a class for each sample, and data {workload.dataset.name} has {_INSTEAD_OF_CLASS[kind]}; use --method exact"
        )
    if workload.task.head_size is None and workload.method.learns_per_layer:
        raise ConfigError(
            f"--method neuroflux needs targets that a head can learn at every layer, and data {workload.dataset.name} has "
            f"{_INSTEAD_OF_CLASS[kind]}; use --method exact"
        )
    if workload.config.local_loss != "cross-entropy" and kind not in ("class", "probabilities"):
        raise ConfigError(
            f"--local-loss {workload.config.local_loss} needs a class for each sample, and data {workload.dataset.name} has "
            f"{_INSTEAD_OF_CLASS[kind]}; use --local-loss cross-entropy"
        )
    if not workload.method.sweeps and (chain := workload.bare.between_blocks) is not None:
        workload = dataclasses.replace(workload, chain=chain, bare=chain, parts=workload.bare)
    return dataclasses.replace(workload, chain=_with_heads(workload)) if workload.method.learns_per_layer else workload


def _with_heads(workload: Workload) -> Chain:
    """Return the chain with a head at every layer that has no class scores of its own, on the meta device."""
    chain, layers = workload.chain, []
    for layer, after in zip(chain.layers, chain.boundaries[1:], strict=True):
        if len(after) > 1 or not after[0].dtype.is_floating_point:
            tensors = ", ".join(map(str, after))
            raise ConfigError(
                f"--method neuroflux needs layers that hand on one tensor each, and {layer.name!r} of {workload.source.spec} hands on "
                f"{tensors}; use --method exact"
            )
    for number, layer in enumerate(chain.layers):
        with torch.device("meta"):
            head = workload.head(number)
        layers.append(layer if head is None else layer.with_head(head, number))
    return dataclasses.replace(chain, layers=tuple(layers))


def _check_head(source: ModelSource, config: FitConfig, dataset: Dataset) -> None:
    """Refuse a head that would see what it is to learn."""
    next_tokens = config.data.partition(":")[0] in LANGUAGE_KINDS or "tokenizer" in dataset.preparation
    if source.transformers is not None and source.transformers.task == "masked-lm" and next_tokens:
        raise ConfigError(
            f"model {source.spec} has a masked-LM head, and data {config.data} asks for the next token, which it would see; give a causal "
            "model, or pairs of masked tokens and labels from Python"
        )


def _check_input(source: ModelSource, dataset: Dataset, model: nn.Module) -> None:
    """Refuse the commonest ways in which a model does not take the samples, in words that say what to write."""
    widths = source.spec.removeprefix("mlp:").split("-")
    if source.spec.startswith("mlp:") and dataset.sample_shape != (int(widths[0]),):
        size = math.prod(dataset.sample_shape)
        raise ConfigError(
            f"model {source.spec} takes {widths[0]} values, and the samples of data {dataset.name} have {size}; "
            f"write mlp:{'-'.join([str(size), *widths[1:]])}"
        )
    most = source.most_context or source.context
    if source.context is not None and most is not None and (dataset.dtype != torch.int64 or dataset.sample_shape[0] > most):
        found = f"{dataset.sample_shape} {str(dataset.dtype).removeprefix('torch.')}"
        remedy = f"--data text:FILE, or tokens of shape ({most},)"
        if "context" in dataset.preparation:
            remedy = f"--context {most} at most"
        raise ConfigError(
            f"model {source.spec} takes up to {most} tokens (int64), and the samples of data {dataset.name} are {found}; give {remedy}"
        )
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(dtypes) == 1 and dataset.dtype.is_floating_point and dataset.dtype not in dtypes:
        found = str(dtypes.pop()).removeprefix("torch.")
        raise ConfigError(f"model {source.spec} has {found} weights, and samples are float32; have it built with model.float()")


def profile_workload(workload: Workload, device: Device, cache: MeasurementCache | None = None) -> MemoryProfile:
    """Profile what each layer needs, by fake tensors. Of several optimizers the largest is counted for all.

    Args:
        workload: model, data and method.
        device: training device.
        cache: measurements of profiles of the same model under other methods; new ones are added.
    """
    config = workload.config
    optimizers = [
        OptimizerSpec(
            name,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=config.fused,
            state=config.optimizer_state,
            weights=config.weights_dtype,
        )
        for name in config.optimizer
    ]
    return profile(
        workload.chain,
        optimizers=optimizers,
        device=device.torch_device,
        cuts_through_ties=workload.method.sweeps,
        per_layer_loss=workload.method.learns_per_layer,
        cache=cache,
    )
