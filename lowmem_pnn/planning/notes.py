"""Notes on a plan: in what training by it differs from plain PyTorch's, in a line each."""

import math
from collections.abc import Mapping
from types import MappingProxyType

from torch import nn

from lowmem_pnn.adapters.prepared_model import adapter_modules, frozen_head_notes, output_layer_notes
from lowmem_pnn.config.faults import as_typed
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.device import Device
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.batch_norm import whole_batch_notes
from lowmem_pnn.planning.disk_footprint import num_evaluated_samples
from lowmem_pnn.planning.kept_products import kept_notes
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.planning.resident_state import resident_notes
from lowmem_pnn.pretrained.matching import describe_weights, shortened
from lowmem_pnn.quantization.stored_weights import num_values, stored_parts
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload
from lowmem_pnn.workload.data_notes import data_notes
from lowmem_pnn.workload.model_notes import model_notes, moving_tensors

_MOST_NAMES = 3


def plan_notes(request: PlanRequest, plan: Plan, mixing: Mapping[str, int] = MappingProxyType({})) -> list[str]:
    """Return all notes on a plan.

    Args:
        request: workload, layer costs and device.
        plan: plan for the request.
        mixing: modules that mix samples, with the numbers of their layers; nobody knows before the model was built with its values.
    """
    pretrained = request.workload.pretrained
    begins = [] if pretrained is None else [f"{describe_weights(pretrained.summary())}; {_training(request.workload.config)}"]
    whole = [f"layer {layer.name!r} is {layer.whole}" for layer in request.workload.chain.layers if layer.whole]
    return [
        *request.workload.source.notes,
        *begins,
        *adapter_notes(request.workload),
        *data_notes(request.workload),
        *frozen_notes(request.workload),
        *fixed_notes(request.workload, plan),
        *resident_notes(plan),
        *vocabulary_notes(request.workload, plan),
        *kept_notes(plan),
        *meta_notes(request.workload, plan),
        *pattern_notes(request.workload, plan),
        *augmentation_notes(request.workload, plan),
        *mixing_notes(request.workload),
        *whole_batch_notes(request, plan, mixing),
        *micro_batch_notes(request.workload, plan),
        *model_notes(request.workload),
        *metric_notes(request.workload),
        *precision_notes(request.workload.config),
        *tier_notes(request.workload, request.device),
        *device_notes(request.device),
        *whole,
    ]


def metric_notes(workload: Workload) -> list[str]:
    """Return which metrics of the user's own keep all answers of what is measured, in memory that no plan counts.

    Args:
        workload: model, data and method.
    """
    given = workload.task.metrics
    if given is None or not (names := given.keeping_all()) or not (samples := num_evaluated_samples(workload)):
        return []
    nbytes = samples * sum(spec.sample_bytes for spec in workload.chain.boundaries[-1])
    return [
        f"metric {name!r} keeps what it needs of all {samples:,} samples, {format_bytes(nbytes)} or more that is in no plan: leave room for it, "
        "or give one of fixed size (thresholds=100)"
        for name in names
    ]


def vocabulary_notes(workload: Workload, plan: Plan) -> list[str]:
    """Return which gradients are made in pieces, since the budget does not hold them as a whole.

    Args:
        workload: model, data and method.
        plan: plan of the run.
    """
    if plan.vocabulary_tile is None:
        return []
    if not plan.vocabulary_tile:
        return ["the gradient of the embedding is kept as rows of the tokens that occur: the budget does not hold all of it"]
    return [
        f"scores and gradient of the last layer ({workload.chain.layers[-1].name!r}) are made {plan.vocabulary_tile} classes at a time, since "
        "the budget does not hold them: sums are rounded otherwise than in plain PyTorch, and one product in four is computed twice"
    ]


def adapter_notes(workload: Workload) -> list[str]:
    """Return which adapters learn, what learns whole beside them, and in which types frozen weights are kept.

    Args:
        workload: model, data and method.
    """
    chain, config = workload.bare, workload.config
    notes = []
    if config.lora is not None:
        modules = adapter_modules(chain.modules())
        count = sum(one.lora_A.numel() + one.lora_B.numel() for one in modules.values())
        called = list(dict.fromkeys(name.rpartition(".")[2] for name in modules))
        layers = f"{len(modules)} linear layer{'s' if len(modules) > 1 else ''}"
        text = (
            f"adapters of rank {config.lora.r}, alpha {config.lora.alpha:g}, on {layers} ({shortened(called)}): {count:,} values"
        )
        if config.modules_to_save:
            text += f"; {shortened(config.modules_to_save)} learn{'s' if len(config.modules_to_save) == 1 else ''} whole"
        facts = workload.source.transformers
        notes += [text, *output_layer_notes(chain, config.lora), *frozen_head_notes(chain, None if facts is None else facts.task)]
    kept: dict[str, dict[str, int]] = {}
    learning = {
        chain.owner_of(name): one.numel()
        for layer in chain.layers
        for name, one in layer.parameters().items()
        if one.requires_grad
    }
    parts = {name: part for name, part in stored_parts(chain.modules()).items() if chain.owner_of(name) == name}
    if rounded := [name for name in parts if name in learning]:
        notes.append(
            f"{sum(learning[name] for name in rounded):,} of {sum(learning.values()):,} values that learn are kept in bf16 (linear layers and "
            "embeddings), and so are their gradients; a step rounds them at random"
        )
    for name, part in parts.items():
        if not part.end and name not in learning:
            kept.setdefault(part.form.name, {})[name] = math.prod(part.form.shape)
    if kept:
        sizes = ", ".join(
            f"{sum(own.values()):,} values in {form}" for form, own in sorted(kept.items(), key=lambda item: item[0] == "bf16")
        )
        notes.append(f"frozen weights are kept as {sizes}, and cast layer by layer to what is computed in")
    if names := workload.unstored:
        called = list(dict.fromkeys(name.rpartition(".")[2] for name in sorted(names)))
        one = f"the weight of {min(names)!r} is kept in fp32: the forward of the model reads it without calling the module"
        which = f"{len(names)} modules ({shortened(called)})"
        many = f"the weights of {which} are kept in fp32: the forward of the model reads them without calling these"
        notes.append(many if len(names) > 1 else one)
    return notes


def frozen_notes(workload: Workload) -> list[str]:
    """Return what of a model does not learn, and which BatchNorms have what mode.

    Args:
        workload: model, data and method.
    """
    if workload.early is not None:
        until = workload.config.unfreeze_at
        when = "in the first epoch" if until == 1 else f"in the first {until} epochs"
        return [
            *(f"{note}, {when}" for note in frozen_notes(workload.early)),
            *(f"{note}, after that" for note in _frozen_notes(workload)),
        ]
    return _frozen_notes(workload)


def _frozen_notes(workload: Workload) -> list[str]:
    chain = workload.bare
    sizes: dict[str, tuple[int, bool]] = {}
    for layer in chain.layers:
        values = num_values(layer.module)
        own = {name: (values.get(id(one), one.numel()), one.requires_grad) for name, one in layer.parameters().items()}
        sizes |= {chain.owner_of(name): size for name, size in own.items() if size[0]}
    frozen = [size for size, learns in sizes.values() if not learns]
    if not frozen:
        return []
    text = f"frozen: {len(frozen)} of {len(sizes)} parameters ({sum(frozen):,} of {sum(size for size, _ in sizes.values()):,} values)"
    norms = [
        (name in layer.modes.in_train, [one.requires_grad for one in module.parameters(recurse=False)])
        for layer in chain.layers
        for name, module in layer.module.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    if kept := sum(in_eval for in_eval, _ in norms):
        text += f"; {kept} BatchNorm{'s' if kept > 1 else ''} in eval mode"
    moving = sum(not in_eval and not any(own) for in_eval, own in norms)
    if moving:
        text += f"; the statistics of {moving} frozen BatchNorm{'s' if moving > 1 else ''} go on moving, unless --freeze-norm is given"
    return [text]


def fixed_notes(workload: Workload, plan: Plan) -> list[str]:
    """Return what is said of frozen partitions whose outputs are written once.

    Args:
        workload: model, data and method.
        plan: partitions of the model.
    """
    count = sum(stop <= workload.fixed_layers for _, stop in plan.spans)
    if not count:
        return []
    which = "partition 1 is frozen: its outputs are" if count == 1 else f"partitions 1 to {count} are frozen: their outputs are"
    return [f"{which} written once, and read in every epoch (--no-cache-frozen: computed in every epoch)"]


def precision_notes(config: FitConfig) -> list[str]:
    """Return what is said of products that are less precise than the types of their factors.

    Args:
        config: options of the run.
    """
    return ["matrices of fp32 are multiplied in TF32, with 10 bits of mantissa (--tf32)"] if config.tf32 else []


def tier_notes(workload: Workload, device: Device) -> list[str]:
    """Return what is said of host memory that a run takes beside the device.

    Args:
        workload: model, data and method.
        device: training device.
    """
    if device.shares_host or not workload.method.sweeps or not workload.config.host_tier:
        return []
    limit = workload.config.max_host_mem
    share = "half of what is available" if limit is None else f"{format_bytes(limit // 2)}, half of --max-host-mem,"
    return [
        f"weights and optimizer state stay in host memory between commits, as far as {share} holds them (--no-host-tier: in files alone)"
    ]


def device_notes(device: Device) -> list[str]:
    """Return what is said of a device whose budget is not known to be a wall.

    Args:
        device: training device.
    """
    context = device.context
    if context.get("found") == "described":
        return [f"{format_bytes(int(context['bytes']))} of the budget are taken for the CUDA context, libraries included"]
    if context.get("found") != "assumed":
        return []
    return [
        f"the driver does not tell what this process holds on the device: {format_bytes(int(context['bytes']))} are taken for the CUDA "
        "context, libraries included"
    ]


def meta_notes(workload: Workload, plan: Plan) -> list[str]:
    """Return what is said of the meta model that partitions learn inside of.

    Args:
        workload: model, data and method.
        plan: partitions of the model.
    """
    if not workload.method.incubates:
        return []
    if not plan.thin_macs:
        return ["one partition is the whole model, and needs no meta model: it trains as by --method backprop"]
    epochs, share = workload.config.num_meta_epochs, sum(plan.thin_macs) / sum(part.forward_macs for part in plan.partitions)
    return [
        f"meta model: {len(plan.thin_macs)} thin parts, {plan.meta_params:,} parameters, {share:.0%} of the model's computation; learns "
        f"{epochs} epoch{'' if epochs == 1 else 's'} first, within {format_bytes(plan.meta_peak_bytes)}"
    ]


def pattern_notes(workload: Workload, plan: Plan) -> list[str]:
    """Return which patterns of parameters' names are not for the meta model.

    Args:
        workload: model, data and method.
        plan: partitions of the model.
    """
    given = [
        option for option, value in (("--no-decay", workload.config.no_decay), ("--lr-for", workload.config.lr_for)) if value
    ]
    if not given or not workload.method.incubates or len(plan.partitions) == 1:
        return []
    return [f"the meta model learns without {' and '.join(given)}: its parameters have names of their own"]


def augmentation_notes(workload: Workload, plan: Plan) -> list[str]:
    """Return what is said of partitions that learn from samples that are not augmented anew in every epoch.

    Args:
        workload: model, data and method.
        plan: partitions of the model.
    """
    config, method = workload.config, workload.method
    reads_all = method.sweeps or method.partitions_are_independent or config.visits == "interleaved"
    if config.augment == "none" or config.views > 1 or reads_all or len(plan.partitions) == 1:
        return []
    more = "" if config.method == "pnn" else " (--views N: from N augmented copies)"
    return [
        f"training samples are augmented for partition 1 alone: from the second partition on they are learnt from as they are, in one copy{more}"
    ]


def mixing_notes(workload: Workload) -> list[str]:
    """Return what is said of training batches whose samples are mixed.

    Args:
        workload: model, data and method.
    """
    config = workload.config
    if config.mixing is None:
        return []
    kinds = [f"{name} {value:g}" for name, value in (("MixUp", config.mixup), ("CutMix", config.cutmix)) if value is not None]
    text = f"training batches are mixed ({' or '.join(kinds)}), and so is what the training loss is taken of"
    if workload.method.learns_per_layer:
        text += "; every block mixes what it learns from"
    if config.cache_frozen and workload.method.sweeps and not all(workload.learns):
        text += "; outputs of frozen layers are computed in every epoch"
    return [text]


def _training(config: FitConfig) -> str:
    """Say what has other defaults with pretrained weights than without."""
    epochs = as_typed(config.epochs)
    return f"trained by {config.method}, {epochs} epoch{'s' if epochs != '1' else ''}, {as_typed(config.optimizer)}, lr {as_typed(config.lr)}"


def micro_batch_notes(workload: Workload, plan: Plan) -> list[str]:
    """Return what is done for each micro-batch that plain PyTorch does once for a batch, beside what BatchNorm does.

    Args:
        workload: model, data and method.
        plan: partitions of the model.
    """
    hooked: list[str] = []
    kept: list[str] = []
    size = batch = 0
    for part in plan.partitions:
        micro_batch = (
            plan.sweep_micro_batch if workload.method.sweeps else min(part.micro_batch, plan.sweep_micro_batch or part.batch)
        )
        if micro_batch >= part.batch:
            continue
        layers = workload.chain.layers[part.start : part.stop]
        own_hooks = [name for layer in layers for name, hooks in layer.hooks.items() if hooks.see_gradients]
        own_state = [name for layer in layers for name in (*layer.python_state, *moving_tensors(layer, workload.chain.moving))]
        if own_hooks or own_state:
            hooked, kept, size, batch = [*hooked, *own_hooks], [*kept, *own_state], micro_batch, part.batch
    samples = f"of {size} of the {batch} samples of a batch, and in plain PyTorch once for all of them"
    notes = []
    if workload.needs_whole_batch:
        notes.append("the loss of a batch is not made up of the losses of its parts: every batch goes through at once")
    if hooked:
        notes.append(
            f"hooks on gradients (of {hooked[0]!r}{f' and {len(hooked) - 1} more' if len(hooked) > 1 else ''}) run for each gradient {samples}"
        )
    if kept:
        more = f" and {len(kept) - _MOST_NAMES} more" if len(kept) > _MOST_NAMES else ""
        notes.append(f"forwards change {', '.join(map(repr, kept[:_MOST_NAMES]))}{more} once for each micro-batch {samples}")
    return notes
