"""Support: what a model may hold and override, so that training it in pieces is training it; the rest is refused by name."""

import json
import types
import warnings
from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.copies import copy_on_meta
from lowmem_pnn.model.modes import overrides
from lowmem_pnn.model.parameter_hooks import MODULE_HOOKS
from lowmem_pnn.model.python_state import attributes_of, modules_in

# Attributes that a GraphModule has and a plain module has not: a submodule of such a name would be lost.
_GRAPH_MODULE_NAMES = {*dir(fx.GraphModule(nn.Module(), fx.Graph()))} - {*dir(nn.Module())}

# Methods of nn.Module that ordinary training calls on the model and training in pieces does not, with what stands in for them here.
_NOT_CALLED = {
    "zero_grad": "gradients are freed layer by layer",
    "_apply": "tensors are moved one by one",
    "named_parameters": "parameters are found by nn.Module's own",
    "named_buffers": "buffers are found by nn.Module's own",
    "named_modules": "modules are found by nn.Module's own",
    "named_children": "modules are found by nn.Module's own",
}
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_parameter_registration_hooks",
)
# Element types that weight files hold.
_DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool,
})  # fmt: skip


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers, under every name: those of the `state_dict` in its order, then the others.

    Args:
        model: the user's model.

    Raises:
        CaptureError: its `state_dict` holds something else.
    """
    title = type(model).__name__
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    try:
        state = dict(model.state_dict(keep_vars=True))
    except Exception as error:  # whatever an override raises
        raise CaptureError(f"state_dict(keep_vars=True) of {title} raises {type(error).__name__}: {error}; mend it") from error
    for name, value in state.items():
        if name not in tensors or (value is not tensors[name] and isinstance(value, Tensor)):
            raise CaptureError(
                f"the state_dict of {title} holds {name!r}, which is no parameter or buffer of that name; such "
                "state cannot be trained or saved here, remove it"
            )
    return {name: tensors[name] for name in [*state, *(name for name in tensors if name not in state)]}


def versions_of(model: nn.Module) -> str:
    """Return the metadata of a model's `state_dict`, as JSON, where the model cannot be loaded without it; else nothing.

    PyTorch keeps versions of modules beside the tensors of a `state_dict`, and a few modules ask for theirs (torchvision's MNASNet). What
    is read from a file has none.

    Args:
        model: the user's model, which stays as it is.
    """
    twin = copy_on_meta(model)
    state = twin.state_dict()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each tensor's copy to nowhere
            twin.load_state_dict(dict(state), strict=True)
    except Exception:  # whatever a module of the user's raises over it
        return json.dumps(getattr(state, "_metadata", {}))
    return ""


def check_model(model: nn.Module, names: Mapping[str, Tensor]) -> None:
    """Refuse a model that holds, or overrides, what training in pieces would lose.

    Args:
        model: the user's model.
        names: its `tensors_by_name`.

    Raises:
        CaptureError: there is such a thing; the message names it.
    """
    title = type(model).__name__
    for hooks in _GLOBAL_HOOKS:
        if getattr(torch.nn.modules.module, hooks, None):
            raise CaptureError(
                f"a hook on all modules is registered (torch.nn.modules.module.{hooks}), which the model's containers would not get here; "
                "register hooks on the modules themselves"
            )
    for name, module in model.named_modules():
        where = f"module {name!r} of {title}" if name else f"model {title}"
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{where} is a torch.jit.ScriptModule, whose tensors cannot be exchanged; give the module that was scripted"
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            raise CaptureError(
                f"{where} has sparse gradients ({type(module).__name__}(sparse=True)), which no optimizer here takes; leave sparse=True out"
            )
        _check_replaced_methods(module, where)
        _check_tensor_types(module, where)
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                raise CaptureError(
                    f"{where} uses a tensor without values, {attribute!r}, that is neither a parameter nor a buffer; register it with "
                    "register_buffer()"
                )
        _check_hooks([hook for kind in MODULE_HOOKS for hook in getattr(module, kind).values()], where)
    for name, tensor in names.items():
        after = getattr(tensor, "_post_accumulate_grad_hooks", None) or {}
        _check_hooks([*(tensor._backward_hooks or {}).values(), *after.values()], f"{name!r} of {title}")
    _check_tensors(title, names)
    _check_hidden_modules(model)


def check_overrides(model: nn.Module, opened: Iterable[str]) -> None:
    """Refuse methods of opened modules that would not be called.

    Args:
        model: the user's model.
        opened: names of the modules whose own classes are not there any more in the layers.

    Raises:
        CaptureError: one of them overrides such a method.
    """
    title = type(model).__name__
    for name in opened:
        module = model.get_submodule(name)
        where = f"module {name!r} of {title}" if name else f"model {title}"
        for method, instead in _NOT_CALLED.items():
            if overrides(module, method) and (not name or method == "_apply"):
                raise CaptureError(
                    f"{where} overrides {method}(), which is not called here ({instead}); do that in its constructor or its forward"
                )
    learning = [id(parameter) for parameter in nn.Module.parameters(model) if parameter.requires_grad]
    if (
        overrides(model, "parameters")
        and [id(parameter) for parameter in model.parameters() if parameter.requires_grad] != learning
    ):
        raise CaptureError(
            f"model {title} overrides parameters(), which leaves out some that learn; freeze these instead (requires_grad_(False))"
        )


def check_tensors_stay(title: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Refuse a forward that registers parameters or buffers, removes them, or gives them another shape or type: files have places for those
    that were there.

    Args:
        title: the model's class.
        before: its parameters and buffers, by name, before a forward.
        after: the same after it.

    Raises:
        CaptureError: they are others.
    """
    advice = "; where the first forward alone does so, run the model once on a sample, and give the built model"
    if new := [name for name in after if name not in before]:
        kind = "parameter" if isinstance(after[new[0]], nn.Parameter) else "buffer"
        raise CaptureError(
            f"forward of {title} registers {kind} {new[0]!r}, which was not there before; register it in the constructor{advice}"
        )
    for name, tensor in before.items():
        found = after.get(name)
        if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            now = "is not there" if found is None else f"is {_form_of(found)}"
            raise CaptureError(
                f"{name!r} of {title} was {_form_of(tensor)} and {now} after a forward; keep its shape and type{advice}"
            )


def check_learning_stays(title: str, before: Mapping[str, bool], after: Mapping[str, Tensor]) -> None:
    """Refuse a forward that leaves parameters frozen which learned before it, or the other way round.

    Args:
        title: the model's class.
        before: whether each of its tensors learned before a forward, by name.
        after: the tensors after it.

    Raises:
        CaptureError: one of them is otherwise now.
    """
    for name, learned in before.items():
        if after[name].requires_grad != learned:
            did, way = ("freezes", "detach() what it gives") if learned else ("unfreezes", "let it learn from the beginning")
            raise CaptureError(
                f"forward of {title} {did} {name!r} (requires_grad), which is not kept with a run; {way}, or give --freeze with --unfreeze-at"
            )


def _form_of(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _check_replaced_methods(module: nn.Module, where: str) -> None:
    """Refuse methods that were replaced on a module by functions which hold on to it: a copy would still call them on the first module."""
    for name, value in vars(module).items():
        if isinstance(value, types.FunctionType) and hasattr(nn.Module, name):
            held = [cell.cell_contents for cell in value.__closure__ or ()]
            if any(isinstance(getattr(content, "__self__", content), nn.Module) for content in held):
                raise CaptureError(
                    f"{name}() of {where} was replaced on the module by a function that holds on to a module, and would go on with that one "
                    "when the model is cut; override it in a class"
                )


def _check_hidden_modules(model: nn.Module) -> None:
    """Refuse modules with parameters that are in plain lists alone: PyTorch finds these for no optimizer and no `state_dict`."""
    registered = set(map(id, model.modules()))
    for (name, attribute), value in attributes_of(model).items():
        for module in modules_in(value):
            if id(module) not in registered and any(True for _ in module.parameters()):
                where = f"module {name!r} of {type(model).__name__}" if name else f"model {type(model).__name__}"
                raise CaptureError(
                    f"{where} holds a {type(module).__name__} in its attribute {attribute!r} that is not registered as a module, as those in a "
                    "plain list are not: its weights would be neither moved, nor trained, nor saved; keep it in an nn.ModuleList, and freeze "
                    "it (requires_grad_(False)) if it is not to learn"
                )


def _check_hooks(hooks: Iterable[object], where: str) -> None:
    """Refuse hooks that use a tensor of the model's constructor, which made it without values."""
    for hook in hooks:
        names = getattr(getattr(hook, "__code__", None), "co_freevars", ())
        for name, cell in zip(names, getattr(hook, "__closure__", None) or (), strict=False):
            if cell != types.CellType() and isinstance(cell.cell_contents, Tensor) and cell.cell_contents.is_meta:
                raise CaptureError(
                    f"a hook on {where} uses {name!r}, a tensor that was made with the model, which is built without values here; make it in "
                    "the hook, or give the built model"
                )


def _check_tensor_types(module: nn.Module, where: str) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) not in (nn.Parameter, nn.parameter.UninitializedParameter):
            kind = type(parameter.data).__name__ if type(parameter.data) is not Tensor else type(parameter).__name__
            raise CaptureError(
                f"parameter {name!r} of {where} is a {kind}, which cannot be moved in pieces; make it an nn.Parameter"
            )
    for name, buffer in module._buffers.items():
        if buffer is not None and type(buffer) not in (Tensor, nn.Buffer, nn.Parameter, nn.parameter.UninitializedBuffer):
            raise CaptureError(
                f"buffer {name!r} of {where} is a {type(buffer).__name__}, which cannot be moved in pieces; make it a plain tensor"
            )


def _check_tensors(title: str, names: Mapping[str, Tensor]) -> None:
    for name, tensor in names.items():
        if torch.nn.parameter.is_lazy(tensor):
            raise CaptureError(f"{name!r} of {title} has no shape yet; run the model once on one sample before it is captured")
        if name.split(".")[0] in _GRAPH_MODULE_NAMES:
            raise CaptureError(f"{title} has an attribute {name.split('.')[0]!r}, which torch.fx keeps for itself; rename it")
        if tensor.layout != torch.strided or tensor.is_quantized:
            layout = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
            raise CaptureError(f"{name!r} of {title} is a {layout} tensor; make it dense")
        if tensor.dtype not in _DTYPES:
            dtype = str(tensor.dtype).removeprefix("torch.")
            advice = (
                "keep its real and imaginary parts, and call torch.view_as_complex in forward"
                if tensor.is_complex()
                else "cast it"
            )
            raise CaptureError(f"{name!r} of {title} is of type {dtype}, which weight files do not hold; {advice}")
    _check_memory(title, names)


def _check_memory(title: str, names: Mapping[str, Tensor]) -> None:
    """Refuse two tensors over one memory, as `b.weight.data = a.weight.data` makes them: they part as soon as one of them is moved."""
    spans: dict[int, list[tuple[int, int, str, Tensor]]] = {}
    for name, tensor in names.items():
        if tensor.numel():
            first = int(tensor.storage_offset()) * tensor.itemsize
            reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
            last = first + tensor.itemsize * (1 + int(reach))
            spans.setdefault(tensor.untyped_storage()._cdata, []).append((first, last, name, tensor))
    for shared in spans.values():
        shared.sort(key=lambda span: span[:2])
        for (_, end, name, tensor), (start, _, other_name, other) in pairwise(shared):
            if start < end and other is not tensor and (tensor.requires_grad or other.requires_grad):
                raise CaptureError(
                    f"{name!r} and {other_name!r} of {title} are two tensors over one memory; make them one, as by `b.weight = a.weight`"
                )
