"""Equal blocks: modules of a list that compute the same, by a key of theirs; on fake tensors one of them runs, and the others repeat it.

A model of language has some thirty blocks that differ in their weights alone, and is run on fake tensors some fifteen times until it is
cut. What the first block of a kind does is taken down: its operations, what it returns, and which parameters and inputs that depends on.
A block of the same kind that is called in the same way then leaves the same in the log, and returns tensors of the same shapes. A block
runs itself, whatever its kind, where the first one changed anything, draws from objects that have no key, read its number in the list, or
returned what is not new.
"""

import re
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import BuiltinFunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from lowmem_pnn.capture.dispatch_modes import OperationLog, has_values, storages_of
from lowmem_pnn.model.python_state import Snapshot, version_of

# Attributes of every module: tensors and submodules are compared apart, and the mode is not compared.
_MODULE_ATTRIBUTES = frozenset({*vars(nn.Module()), "training"})
# Names of settings that may be a module's number in a list, as `layer_idx`.
_PLACE = re.compile(r"(^|_)(i|id|idx|index|no|number|layer|depth)$")
_PLAIN_TYPES = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.Size,
    torch.memory_format,
    slice,
    type(Ellipsis),
)


@dataclass(frozen=True)
class Identity:
    """The identity of an object, which another one may have when it is gone."""

    number: int


_LEAST_BLOCKS = 3
# What a call may be given and give beside tensors.
_PLAIN_ARGUMENTS = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass
class _Output:
    """A tensor that a block returned.

    Args:
        shape: its shape.
        stride: its strides.
        dtype: its type.
        device: its device.
        inputs: numbers of the tensors among the block's arguments that it depends on.
        parameters: names of the block's parameters that it depends on.
        depends: whether the log takes it for computed from samples or weights.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    inputs: list[int]
    parameters: list[str]
    depends: bool


@dataclass
class _Run:
    """What a block did when it was called.

    Args:
        block: the block.
        given: leaves of its arguments, which are kept alive so that their identities stay their own.
        leaves: leaves of what it returned: outputs, or plain values.
        form: how they are put together.
        part: what it left in the log, if there was one.
        taken: numbers of the tensors among its arguments that operations were given.
    """

    block: nn.Module
    given: Sequence[Any]
    leaves: Sequence[Any]
    form: Any
    part: "tuple[list[tuple[Any, ...]], int, int]"
    taken: Sequence[int]


class _Repeat(torch.autograd.Function):
    """A tensor that depends on others as another block's output did."""

    @staticmethod
    def forward(ctx: Any, like: _Output, *sources: Tensor) -> Tensor:
        """Make the tensor."""
        return torch.empty_strided(like.shape, like.stride, dtype=like.dtype, device=like.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Nothing goes back: the graph alone is looked at."""
        raise NotImplementedError


_kinds: WeakKeyDictionary[nn.Module, list[list[tuple[str, int]]]] = WeakKeyDictionary()


def look_again(model: nn.Module) -> None:
    """Forget the blocks of a model, which may have been changed since it was looked through."""
    _kinds.pop(model, None)


def _kinds_of(model: nn.Module) -> list[list[tuple[str, int]]]:
    """Return the names and places of the blocks of each kind, where there are several."""
    if model not in _kinds:
        found: list[list[tuple[str, int]]] = []
        for name, parent in model.named_modules():
            kinds: dict[Hashable, list[tuple[str, int]]] = {}
            blocks = parent.named_children() if isinstance(parent, nn.ModuleList | nn.Sequential) else ()
            for place, (own, block) in enumerate(blocks):
                if any(True for _ in block.children()) and "forward" not in vars(block):
                    kinds.setdefault(module_key(block, [place]), []).append((f"{name}.{own}".lstrip("."), place))
            found += [alike for alike in kinds.values() if len(alike) >= _LEAST_BLOCKS]
        _kinds[model] = found
    return _kinds[model]


class EqualBlocks:
    """The equal blocks of a copy of a model with fake tensors.

    Args:
        model: the model.
        root: the copy, in its mode, whose blocks are told how to run.
    """

    def __init__(self, model: nn.Module, root: nn.Module) -> None:
        self._runs: dict[Hashable, _Run | None] = {}
        for number, blocks in enumerate(_kinds_of(model)):
            for name, place in blocks:
                block = root.get_submodule(name)
                modes = tuple(module.training for module in block.modules())
                # An attribute of the instance is what `nn.Module.__call__` calls.
                vars(block)["forward"] = partial(self._call, block, place, (number, modes), block.forward)

    def _call(self, block: nn.Module, place: int, kind: Hashable, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given, form = pytree.tree_flatten((args, kwargs))
        log = OperationLog.running[0] if OperationLog.running else None
        if not all(isinstance(leaf, (Tensor, *_PLAIN_ARGUMENTS)) for leaf in given):
            return forward(*args, **kwargs)
        first: dict[int, int] = {}
        keys = tuple(
            (first.setdefault(id(leaf), number), _tensor_key(leaf, log)) if isinstance(leaf, Tensor) else value_key(leaf)
            for number, leaf in enumerate(given)
        )
        key = kind, str(form), keys, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), log is None
        if key not in self._runs:
            self._runs[key] = None  # for blocks inside of it, and where it raises
            result, self._runs[key] = _taken_down(block, place, forward, args, kwargs, given, log)
            return result
        run = self._runs[key]
        return forward(*args, **kwargs) if run is None else _repeated(run, block, given, log)


def _tensor_key(tensor: Tensor, log: OperationLog | None) -> Hashable:
    """Return what of a tensor a block may depend on; of one that has values, itself."""
    itself = id(tensor) if has_values(tensor) else None
    return value_key(tensor), tensor.device, tensor.storage_offset(), itself, log is not None and log.depends(tensor)


def _taken_down(
    block: nn.Module,
    place: int,
    forward: Callable[..., Any],
    args: Any,
    kwargs: Any,
    given: Sequence[Any],
    log: OperationLog | None,
) -> tuple[Any, _Run | None]:
    """Run a block, and take down what it does; None where that would not hold for another one."""
    own = {**dict(block.named_parameters(remove_duplicate=False)), **dict(block.named_buffers(remove_duplicate=False))}
    inputs = [leaf for leaf in given if isinstance(leaf, Tensor)]
    before = Snapshot(block), {id(tensor): version_of(tensor) for tensor in (*own.values(), *inputs)}
    begin = (len(log.entries), log.new_bytes, log.draws) if log is not None else (0, 0, 0)
    taken_before = log.taken if log is not None else {}
    if log is not None:
        log.taken = {}
    with _place_watched(block, place) as reads:
        result = forward(*args, **kwargs)
    part: tuple[list[tuple[Any, ...]], int, int] = [], 0, 0
    taken: list[int] = []
    if log is not None:
        part = log.entries[begin[0] :], log.new_bytes - begin[1], log.draws - begin[2]
        taken = [number for number, leaf in enumerate(given) if id(leaf) in log.taken]
        log.taken = {**taken_before, **log.taken}
    now = {**dict(block.named_parameters(remove_duplicate=False)), **dict(block.named_buffers(remove_duplicate=False))}
    is_unchanged = (
        now.keys() == own.keys()
        and all(now[name] is tensor for name, tensor in own.items())
        and all(version_of(tensor) == before[1][id(tensor)] for tensor in (*own.values(), *inputs))
        and not before[0].changed(block)
    )
    if reads or not is_unchanged or any(_has_hooks(module) for module in block.modules()):
        return result, None
    leaves, form = pytree.tree_flatten(result)
    seen = storages_of((inputs, list(own.values())))
    outputs: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, _PLAIN_ARGUMENTS):
            outputs.append(leaf)
            continue
        if not isinstance(leaf, Tensor) or has_values(leaf) or leaf.storage_offset() or storages_of(leaf) & seen:
            return result, None
        seen |= storages_of(leaf)
        sources = _sources(leaf, given, own)
        if leaf.requires_grad != any(sources):
            return result, None
        depends = log is not None and log.depends(leaf)
        outputs.append(_Output(leaf.shape, leaf.stride(), leaf.dtype, leaf.device, *sources, depends))
    return result, _Run(block, given, outputs, form, part, taken)


def _repeated(run: _Run, block: nn.Module, given: Sequence[Any], log: OperationLog | None) -> Any:
    """Return what a block returns that does as another one did, and leave in the log what that one left."""
    parameters = dict(block.named_parameters(remove_duplicate=False))
    new_bytes = log.new_bytes if log is not None else 0
    leaves = []
    for leaf in run.leaves:
        if isinstance(leaf, _Output):
            sources = [*(given[number] for number in leaf.inputs), *(parameters[name] for name in leaf.parameters)]
            made = _Repeat.apply(leaf, *sources)
            if log is not None and leaf.depends:
                log.add_dependent(made)
            leaf = made
        leaves.append(leaf)
    if log is not None:
        entries, size, draws = run.part
        log.entries += entries
        log.new_bytes = new_bytes + size
        log.draws += draws
        log.taken.update((id(given[number]), given[number]) for number in run.taken)
        log.repeats.append((block, run.block))
    return pytree.tree_unflatten(leaves, run.form)


def _sources(output: Tensor, given: Sequence[Any], own: Mapping[str, Tensor]) -> tuple[list[int], list[str]]:
    """Return the numbers of the arguments and the names of the parameters that a tensor depends on."""
    ends = {leaf.grad_fn: number for number, leaf in enumerate(given) if isinstance(leaf, Tensor) and leaf.grad_fn is not None}
    leaf_numbers = {id(leaf): number for number, leaf in enumerate(given) if isinstance(leaf, Tensor) and leaf.grad_fn is None}
    names: dict[int, str] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), name)
    stack = [output.grad_fn] if output.grad_fn is not None else []
    seen, inputs, parameters = set(stack), set(), set()
    while stack:
        function = stack.pop()
        if function in ends:
            inputs.add(ends[function])
            continue
        variable = id(getattr(function, "variable", None))
        if variable in names:
            parameters.add(names[variable])
        elif variable in leaf_numbers:
            inputs.add(leaf_numbers[variable])
        new = [inner for inner, _ in function.next_functions if inner is not None and inner not in seen]
        seen.update(new)
        stack.extend(new)
    return sorted(inputs), sorted(parameters)


@contextmanager
def _place_watched(block: nn.Module, place: int) -> Iterator[set[str]]:
    """Collect the names of the settings that are the block's number, and that it reads."""
    hidden = {
        (id(module), name): vars(module).pop(name)
        for module in block.modules()
        for name, value in [*vars(module).items()]
        if is_place(name, value, [place])
    }
    modules = {id(module): module for module in block.modules()}
    reads: set[str] = set()
    original = nn.Module.__getattr__

    def watched(self: nn.Module, name: str) -> Any:
        if (id(self), name) in hidden:
            reads.add(name)
            return hidden[id(self), name]
        return original(self, name)

    nn.Module.__getattr__ = watched  # type: ignore[method-assign]
    try:
        yield reads
    finally:
        nn.Module.__getattr__ = original  # type: ignore[method-assign]
        for (module, name), value in hidden.items():
            if name in vars(modules[module]):
                reads.add(name)
            else:
                vars(modules[module])[name] = value


def _has_hooks(module: nn.Module) -> bool:
    return any(value for name, value in vars(module).items() if name.endswith("_hooks"))


def module_key(module: nn.Module, places: Sequence[int] = ()) -> Hashable:
    """Return a key of a module's type, settings, tensors and submodules.

    Args:
        module: any module.
        places: its numbers in the lists that it is in; settings that are such a number count as equal.
    """
    settings = tuple(
        (name, ("place", places.index(value)) if is_place(name, value, places) else value_key(value))
        for name, value in sorted(vars(module).items())
        if name not in _MODULE_ATTRIBUTES
    )
    hooks = tuple(Identity(id(module)) for name, value in vars(module).items() if name.endswith("_hooks") and value)
    tensors = tuple(
        (name, None if tensor is None else value_key(tensor))
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )
    children = tuple((name, None if child is None else module_key(child, places)) for name, child in module._modules.items())
    return type(module), settings, hooks, tensors, children


def is_place(name: str, value: Any, places: Sequence[int]) -> bool:
    """Decide whether a setting is a module's number in a list, by its name and its value."""
    return type(value) is int and value in places and _PLACE.search(name) is not None


def value_key(value: Any, numbers: Mapping[fx.Node, int] | None = None) -> Hashable:
    """Return a key of a setting or an argument: of a tensor its shape, of a node its number, of other objects their identity.

    Args:
        value: any value.
        numbers: numbers of the nodes of a graph.
    """
    if isinstance(value, Tensor):
        return type(value), tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    if isinstance(value, fx.Node):
        assert numbers is not None
        return "node", numbers[value]
    if isinstance(value, tuple | list | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return type(value).__name__, tuple(value_key(item, numbers) for item in items)
    if isinstance(value, dict):
        return "dict", tuple((value_key(key), value_key(item, numbers)) for key, item in value.items())
    if isinstance(value, slice):
        return "slice", value_key(value.start, numbers), value_key(value.stop, numbers), value_key(value.step, numbers)
    # 1, 1.0 and True are equal, but not the same to an operation.
    if isinstance(value, _PLAIN_TYPES):
        return type(value), value
    return "the", value if _is_named_by_its_module(value) else Identity(id(value))


def _is_named_by_its_module(value: Any) -> bool:
    """Decide whether a value is a function or a class at the top of a module, or of PyTorch's own making: it lasts as they do."""
    if isinstance(value, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return True
    if isinstance(value, BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, type | ModuleType)
    module, name = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not callable(value) or not isinstance(module, str) or not isinstance(name, str):
        return False
    return vars(sys.modules.get(module, object)).get(name) is value
