"""The model that is trained, made from the user's: what is frozen, in which type that is kept, and the adapters that learn beside it."""

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lowmem_pnn.adapters.lora import (
    ADAPTER_NAMES,
    Adapter,
    add_adapters,
    frozen_base,
    heads_for_classes,
    heads_of,
    is_inside,
    output_layer,
    target_names,
)
from lowmem_pnn.config.adapter_options import ALL_LINEAR, LoraOptions
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.model.copies import copy_structure
from lowmem_pnn.pretrained.freezing import names_by_tensor, with_frozen
from lowmem_pnn.quantization.stored_weights import StoredForm, can_be_stored, is_conv1d, store

if TYPE_CHECKING:
    from lowmem_pnn.config.fit_config import FitConfig


def prepared(
    model: nn.Module, config: "FitConfig", *, early: bool = False, unstored: Collection[str] = (), with_values: bool = True
) -> nn.Module:
    """Return the model that is trained: a copy of the user's over the same tensors, or the user's own where nothing is asked for.

    Args:
        model: the user's model, which stays as it is. Its frozen weights are converted where they are to be kept in another type.
        config: options of the run.
        early: for the epochs before something is unfrozen, where there are such.
        unstored: names of modules whose weights are kept as they are, since the forward reads them by itself (`StoredReadError`).
        with_values: convert values too; else what is converted is on the meta device.

    Raises:
        ConfigError: the options do not fit the model.
    """
    options = config if early else config.after_unfreezing
    targets: list[str] = []
    base: set[str] = set()
    learning: set[str] = set()
    if config.lora is not None:
        whole = config.modules_to_save or ()
        targets, base = target_names(model, config.lora, whole), frozen_base(model, whole)
        learning = {name for names in names_by_tensor(model).values() for name in names} - base
    result = with_frozen(model, options, base, learning)
    if config.frozen_form == "fp32" and config.weights_dtype == "fp32" and not targets:
        return result
    result = copy_structure(result)
    if config.frozen_form != "fp32":
        _store(result, config, unstored, learns=False, with_values=with_values)
    if config.weights_dtype != "fp32":
        _store(result, config, unstored, learns=True, with_values=with_values)
    if config.lora is not None:
        add_adapters(result, targets, config.lora)
    _refuse_fast_paths(result)
    return result


def adapter_modules(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Adapter]:
    """Return the modules with an adapter, by name.

    Args:
        modules: modules with their names in the model.
    """
    return {name: module for name, module in modules if isinstance(module, Adapter)}


def adapter_tensor_names(modules: Iterable[tuple[str, nn.Module]]) -> set[str]:
    """Return the names of the adapters' tensors.

    Args:
        modules: modules with their names in the model.
    """
    return {f"{name}.{own}" for name in adapter_modules(modules) for own in ADAPTER_NAMES}


def new_modules(names: Sequence[str], chain: Chain) -> list[str]:
    """Return the modules that tensors with new values are in and that do not learn, in the model's order.

    Args:
        names: names of the tensors.
        chain: the model in layers.
    """
    frozen = {name for layer in chain.layers for name, one in layer.parameters().items() if not one.requires_grad}
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names if name in frozen and "." in name))


def frozen_head_notes(chain: Chain, task: str | None) -> list[str]:
    """Return that nothing learns in a head for classes of texts, where peft loads no adapter, and what makes it learn.

    Args:
        chain: the model in layers, with adapters.
        task: task of a model of transformers; None of another one.
    """
    if task != "sequence-classification":
        return []
    learning = [name for layer in chain.layers for name, one in layer.parameters().items() if one.requires_grad]
    heads = [head for head in heads_for_classes(chain.persistent) if not any(is_inside(name, [head]) for name in learning)]
    if not heads:
        return []
    return [
        f"the head for classes ({', '.join(heads)}) has no adapter and keeps the values that it began with: name it in --modules-to-save to "
        "have it learn"
    ]


def output_layer_notes(chain: Chain, options: LoraOptions) -> list[str]:
    """Return that `all-linear` has left out another layer than the one that makes the outputs: the last in the constructor, not in the forward.

    Args:
        chain: the model in layers, with adapters.
        options: adapters.
    """
    if options.targets != (ALL_LINEAR,):
        return []
    linear = (
        {name: module for name, module in layer.module.named_modules() if isinstance(module, nn.Linear) or is_conv1d(module)}
        for layer in reversed(chain.layers)
    )
    last = next((found for found in linear if found), {})
    if len(last) != 1 or not adapter_modules(last.items()):
        return []
    return [
        f"{next(iter(last))!r}, which makes the outputs, has an adapter: all-linear leaves out the linear layer that the constructor makes "
        "last; name layers in --lora targets"
    ]


def _store(model: nn.Module, config: "FitConfig", unstored: Collection[str], *, learns: bool, with_values: bool) -> None:
    """Have the modules of a model keep their frozen weights, or those that learn, in the form that is asked for."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    attentions = {id(child) for one in model.modules() if isinstance(one, nn.MultiheadAttention) for child in one.children()}
    parts: dict[int, dict[str, nn.Parameter]] = {}
    count, head = 0, output_layer(model)
    heads = heads_of(model)
    whole = {id(module) for name, module in model.named_modules() if name in unstored}
    for own, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if not can_be_stored(module, learns=learns) or id(module) in attentions or not isinstance(weight, nn.Parameter):
            continue
        sharing = users[id(weight)]
        if any(id(one) in whole for one in sharing):
            continue
        if len(sharing) > 1 and not all(can_be_stored(one, learns=learns) or id(weight) in parts for one in sharing):
            continue
        # As in QLoRA, what tokens are looked up in, or what makes the outputs, has two bytes an element at least.
        at_the_ends = len(sharing) > 1 or isinstance(module, nn.Embedding) or own == head or is_inside(own, heads)
        name = "bf16" if learns or at_the_ends else config.frozen_form
        form = StoredForm(name, tuple(weight.shape), weight.dtype)
        if id(weight) not in parts:
            values = weight.detach() if with_values else torch.empty_like(weight, device="meta")
            parts[id(weight)] = {end: nn.Parameter(tensor, learns) for end, tensor in form.encode(values).items()}
        store(module, form, parts[id(weight)])
        count += 1
    read = f"the forward reads the weight of {min(unstored)!r} without calling it" if unstored else None
    if not count and learns:
        none = "the model has no float32 weights of linear layers or embeddings that learn"
        raise ConfigError(f"--weights-dtype {config.weights_dtype} has no effect here: {read or none}; leave it out")
    if not count and not learns and config.frozen_dtype not in (None, "fp32"):
        none = "the model has no frozen float32 weights of linear layers or embeddings"
        raise ConfigError(f"--frozen-dtype {config.frozen_dtype} has no effect here: {read or none}; leave it out")


def _refuse_fast_paths(model: nn.Module) -> None:
    """Keep transformer layers of PyTorch from a path in eval mode that reads weights without running the modules that have them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
