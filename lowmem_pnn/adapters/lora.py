"""Low-rank adapters: linear layers that add the product of two small matrices, which learn, to what their frozen weights give.

    y = W x + b + (alpha / r) B A dropout(x)        W, b frozen; A (r, in) and B (out, r) learn

Operations and their order are peft's, and so are the random numbers that A begins with: after `torch.manual_seed(seed)`, a constructor,
and `peft.get_peft_model`, every tensor is the same.
"""

import difflib
import functools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_pnn.config.adapter_options import ALL_LINEAR, LoraOptions
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.pretrained.freezing import names_by_tensor
from lowmem_pnn.quantization.stored_weights import is_conv1d
from lowmem_pnn.zoo.transformers_modules import task_of

ADAPTER_NAMES = ("lora_A", "lora_B")
"""Names of the two matrices in their module."""

# Ends of the names of the modules that peft has learn whole wherever a transformers model has classes for texts; none in them is adapted.
_HEADS = ("classifier", "score")

_MOST_NAMED = 6


class Adapter:
    """A linear layer with an adapter."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scaling: float
    lora_dropout: float

    def add_to(self, result: Tensor, inputs: Tensor) -> Tensor:
        """Add what the adapter gives to what the layer's own weights give."""
        # As peft has it. Under autocast the product is cast anyway, and only dropout would see the difference.
        if self.lora_dropout or not torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.to(self.lora_A.dtype)
        if self.lora_dropout:
            inputs = F.dropout(inputs, self.lora_dropout, self.training)  # type: ignore[attr-defined]
        product = F.linear(F.linear(inputs, self.lora_A), self.lora_B)
        return (result + product * self.lora_scaling).to(result.dtype)


def target_names(model: nn.Module, options: LoraOptions, whole: Sequence[str] = ()) -> list[str]:
    """Return the names of the modules that get an adapter, in the model's order.

    Args:
        model: the user's model.
        options: adapters.
        whole: ends of the names of modules that learn whole, which get none.

    Raises:
        ConfigError: a target matches nothing, or no linear layer; or a module that learns whole is not there.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for end in whole:
        if not any(_ends(name, end) for name in modules):
            raise ConfigError(f"--modules-to-save {end!r} matches no module of the model{_near(end, modules)}")
    learning = whole_modules(model, whole)
    heads = heads_of(model)
    without = (*learning, *heads)
    linear = [
        name
        for name, module in modules.items()
        if _is_linear(module) and _fault(model, name) is None and not is_inside(name, without)
    ]
    if options.targets == (ALL_LINEAR,):
        head = output_layer(model)
        found = [name for name in linear if name != head]
        if not found:
            raise ConfigError(
                f"--lora targets={ALL_LINEAR} leaves out the layer that makes the outputs, and the model has no other linear layers; name "
                "its layers in targets"
            )
        return found
    for end in options.targets:
        matched = [name for name in modules if _ends(name, end)]
        if not matched:
            raise ConfigError(f"--lora targets {end!r} matches no module of the model{_near(end, linear)}")
        if all(is_inside(name, heads) and not is_inside(name, learning) for name in matched):
            raise ConfigError(
                f"--lora targets {end!r} is module {matched[0]!r}, in the head for classes, where peft loads no adapter; leave it out, or "
                f"have it learn whole (--modules-to-save {matched[0]})"
            )
        for name in matched:
            if is_inside(name, without):
                continue
            if not _is_linear(modules[name]):
                raise ConfigError(
                    f"--lora targets {end!r} is module {name!r}, of type {type(modules[name]).__name__}, and adapters are for linear layers"
                    f"{_near(end, linear)}"
                )
            if (fault := _fault(model, name)) is not None:
                raise ConfigError(f"--lora targets {end!r} is module {name!r}, {fault}; leave it out")
    return [name for name in linear if any(_ends(name, end) for end in options.targets)]


def frozen_base(model: nn.Module, whole: Sequence[str]) -> set[str]:
    """Return the names of the parameters that do not learn beside adapters; of a tied one, every name.

    Args:
        model: the user's model, without adapters.
        whole: ends of the names of modules that learn whole.

    Raises:
        ConfigError: a parameter of such a module is tied to one of another module.
    """
    kept = whole_modules(model, whole)
    base: set[str] = set()
    for names in names_by_tensor(model).values():
        inside = [name for name in names if any(name.startswith(f"{one}.") for one in kept)]
        if not inside:
            base.update(names)
        elif len(inside) < len(names):
            other = next(name for name in names if name not in inside)
            raise ConfigError(
                f"--modules-to-save: {inside[0]!r} is one tensor with {other!r}, which is frozen; leave its module out, or name both"
            )
    return base


def is_within(name: str, whole: Sequence[str]) -> bool:
    """Decide whether a tensor is of a module that learns whole.

    Args:
        name: name of the tensor.
        whole: ends of the names of modules that learn whole.
    """
    return whole_module_of(name, whole) is not None


def whole_module_of(name: str, whole: Sequence[str]) -> str | None:
    """Return the module that learns whole and has a tensor in it; None where there is none.

    Args:
        name: name of the tensor.
        whole: ends of the names of modules that learn whole.
    """
    parts = name.split(".")
    modules = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((module for module in modules if any(_ends(module, end) for end in whole)), None)


def whole_modules(model: nn.Module, whole: Sequence[str]) -> list[str]:
    """Return the names of the modules that learn whole."""
    return [name for name, _ in model.named_modules() if name and any(_ends(name, end) for end in whole)]


def heads_for_classes(names: Iterable[str]) -> list[str]:
    """Return the modules that peft's own file has to hold whole, of a transformers model that has classes for texts.

    Args:
        names: names of modules, or of tensors in them, in the model's order.

    Example:
        >>> heads_for_classes(["bert.pooler.dense", "classifier.dense.weight", "classifier.out_proj.weight"])
        ['classifier']
    """
    heads: list[str] = []
    for name in names:
        parts = name.split(".")
        before = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        # As peft matches them: `pre_classifier` too.
        if (head := next((one for one in before if one.endswith(_HEADS)), None)) is not None and head not in heads:
            heads.append(head)
    return heads


def heads_of(model: nn.Module) -> list[str]:
    """Return these modules of a model; none of one that has no classes for texts.

    Args:
        model: the model.
    """
    return heads_for_classes(dict(model.named_modules())) if task_of(model) == "sequence-classification" else []


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Decide whether a module, or a tensor, is one of some modules or in one.

    Args:
        name: its name.
        modules: names of the modules.
    """
    return any(name == one or name.startswith(f"{one}.") for one in modules)


def add_adapters(model: nn.Module, names: Collection[str], options: LoraOptions) -> None:
    """Add adapters to modules of a model, which is changed; A is drawn from the global random generator, B is zeros.

    Args:
        model: model whose modules are not the user's own.
        names: modules that get one.
        options: adapters.
    """
    for name, module in model.named_modules():
        if name in names:
            _add(module, options)


def _add(module: nn.Module, options: LoraOptions) -> None:
    device, dtype = module.get_parameter("weight").device, _dtype(module)
    inputs, outputs = features(module)
    # Both matrices are drawn, and A once more, as peft draws them.
    first = nn.Linear(inputs, options.r, bias=False, device=device, dtype=dtype)
    second = nn.Linear(options.r, outputs, bias=False, device=device, dtype=dtype)
    nn.init.kaiming_uniform_(first.weight, a=math.sqrt(5))
    nn.init.zeros_(second.weight)
    module.__class__ = _adapted(type(module))  # type: ignore[arg-type]
    module.register_parameter("lora_A", nn.Parameter(first.weight.detach()))
    module.register_parameter("lora_B", nn.Parameter(second.weight.detach()))
    module.lora_scaling, module.lora_dropout = options.scaling, options.dropout  # type: ignore[assignment]


def features(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.get_parameter("weight")
    form = getattr(module, "stored", None)
    inputs, outputs = form.shape if form is not None else weight.shape
    return int(inputs), int(outputs)


def _dtype(module: nn.Module) -> torch.dtype:
    """Return the type of an adapter: float32, as peft has it beside a base in half precision, or float64."""
    return torch.float64 if module.get_parameter("weight").dtype == torch.float64 else torch.float32


@functools.cache
def _adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of the same modules with an adapter; one class for all of a kind, so that they count as equal."""

    def forward(self: Any, inputs: Tensor) -> Tensor:
        result: Tensor = self.add_to(kind.forward(self, inputs), inputs)
        return result

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "forward": forward}
    return type(kind.__name__, (Adapter, kind), names)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _fault(model: nn.Module, name: str) -> str | None:
    """Return why a linear layer cannot have an adapter; None where it can."""
    parent, module = model.get_submodule(name.rpartition(".")[0]), model.get_submodule(name)
    if isinstance(parent, nn.MultiheadAttention):
        return "whose weight its nn.MultiheadAttention reads without running it"
    if "forward" in vars(module):
        return "whose forward was replaced on the module"
    if (weight := module._parameters.get("weight")) is None:
        return "whose weight is made of others (by a parametrization, a norm or pruning)"
    tied = [other for other, one in model.named_parameters(remove_duplicate=False) if one is weight and other != f"{name}.weight"]
    if tied:
        return f"whose weight is one tensor with {tied[0]!r}, which an adapter would part when it is merged"
    return None


def output_layer(model: nn.Module) -> str | None:
    """Return the name of the linear layer that makes the outputs: what transformers says it is, or else the last one.

    Args:
        model: the user's model.
    """
    if callable(ask := getattr(model, "get_output_embeddings", None)) and (head := ask()) is not None:
        return next((name for name, module in model.named_modules() if module is head), None)
    last = [name for name, module in model.named_modules() if _is_linear(module)][-1:]
    return last[0] if last else None


def _ends(name: str, end: str) -> bool:
    """Decide whether a module's name is another one, or ends in it after a dot, as peft does."""
    return name == end or name.endswith(f".{end}")


def _near(end: str, names: Iterable[str]) -> str:
    """Return the end of a message about a name that matches nothing: one that is near, or what there is."""
    last = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    near = difflib.get_close_matches(end.rpartition(".")[2], last, n=1)
    if near and near[0] != end:
        return f"; did you mean {near[0]!r}?"
    # Numbers alone say nothing.
    shown = list(dict.fromkeys(name if name.rpartition(".")[2].isdigit() else name.rpartition(".")[2] for name in names))
    few = ", ".join(shown[:_MOST_NAMED])
    return f"; there are: {few}{', ...' if len(shown) > _MOST_NAMED else ''}" if shown else ""
