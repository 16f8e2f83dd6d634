"""The model's own forward on fake tensors, which have shapes but no values: the operations it does, and what it leaves in its modules.

What the forward does is compared with what its trace does; what it leaves behind decides which modules may be opened and which Python
state has to be kept. Nothing is allocated, but for small tensors that depend on sizes and constants alone.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from lowmem_pnn.capture.dispatch_modes import KnownValuesError, OperationLog, tensors_in, watching_calls
from lowmem_pnn.capture.setting import Fakes, Setting
from lowmem_pnn.capture.stored_reads import StoredReads
from lowmem_pnn.capture.supported import check_learning_stays, check_tensors_stay
from lowmem_pnn.capture.switches import Switches
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.call_form import NOTHING, OutputForm
from lowmem_pnn.model.copies import first_line, set_mode
from lowmem_pnn.model.parameter_hooks import num_hooks
from lowmem_pnn.model.python_state import (
    Attribute,
    Snapshot,
    attributes_of,
    holds_tensor,
    is_kept,
    is_read,
    modules_in,
    version_of,
)
from lowmem_pnn.seeds import python_generators


class Alias(NamedTuple):
    """A parameter or buffer that a Python attribute holds.

    Args:
        tensor: its name.
        is_itself: whether it is that very tensor, or another one over its memory.
        modules: names of the modules that the attribute holds; none where it holds the tensor.
    """

    tensor: str
    is_itself: bool
    modules: tuple[str, ...] = ()


@dataclass
class ModelRun:
    """What a model's forward does in one setting.

    Args:
        setting: how it was run.
        operations: operations that depend on its samples or its tensors, in their order.
        kept: attributes of its modules that the forward changes, and whose values a run keeps.
        left: attributes in which the forward leaves tensors that no later forward depends on.
        cached: those of them in which the forward keeps what it computed of weights, until the module's own `train()` forgets it.
        written: parameters that the forward changes in place, as an embedding with `max_norm` does.
        changed: parameters and buffers that the forward changes in place, or puts others in the place of.
        made: bytes of the tensors that operations of a module, and of those in it, made; under "" those of all.
        output: what the model returns beside its tensors.
        returned: shapes, with the batch, and types of the tensors that it returns.
        asking: modules that do something by values of tensors (`UnknownValues.asking`).
        switching: modules that set whether parameters learn.
        reached: parameters that a backward from what training learns from gives a gradient to.
        detached: parameters that learn, and whose values a backward takes for what they give no gradient by, as `x @ weight.detach()` does.
        aliased: attributes by which the forward reads parameters or buffers beside their own names, as from a list.
    """

    setting: Setting
    operations: list[tuple[Any, ...]]
    kept: set[Attribute] = field(default_factory=set)
    left: set[Attribute] = field(default_factory=set)
    cached: set[Attribute] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    made: Counter[str] = field(default_factory=Counter)
    output: OutputForm = NOTHING
    returned: Sequence[tuple[torch.Size, torch.dtype]] = ()
    asking: set[str] = field(default_factory=set)
    switching: set[str] = field(default_factory=set)
    reached: set[str] = field(default_factory=set)
    detached: set[str] = field(default_factory=set)
    aliased: dict[Attribute, Alias] = field(default_factory=dict)


def run_model(model: nn.Module, setting: Setting) -> ModelRun:
    """Run a model on fake tensors.

    Args:
        model: module that stays as it is.
        setting: how to run it.

    Raises:
        CaptureError: it does not take such samples, reads a value, draws from a generator whose state is not kept, or leaves something
            in its modules that its next forward reads and that cannot be kept.
        KnownValuesError: it writes into a tensor whose values are known what is not known.
        StoredReadError: it reads a weight that is kept in a smaller type otherwise than by calling its module.
    """
    result = ModelRun(setting, [])
    title = type(model).__name__
    # Tensors that no file holds, before the forward and after it.
    beside: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})

    def forward(fakes: Fakes, log: OperationLog) -> None:
        root, samples = fakes.root, fakes.samples
        before, generators, hooks, reads, switches = (
            Snapshot(root),
            python_generators(),
            num_hooks(root),
            StoredReads(root),
            Switches(root),
        )
        own, persistent = _tensors_of(root), set(root.state_dict(keep_vars=True))
        learns = {name: tensor.requires_grad for name, tensor in own.items() if isinstance(tensor, nn.Parameter)}
        versions = {name: version_of(tensor) for name, tensor in own.items()}
        storages = {name: tensor.untyped_storage()._cdata for name, tensor in own.items()}
        try:
            with _made_by_module(root, log, result.made), fakes.unknown.watching(root), reads.watching(), switches.watching():
                returned = setting.form.call(root, samples)
        except KnownValuesError:
            raise
        except Exception as error:  # whatever a user's module raises on a shape it does not take
            reads.refuse(title)
            where = _deepest_module(root, error)
            raise CaptureError(f"{setting.error_prefix(model)}{where and f', at {where!r}'}: {explain(error)}") from error
        reads.refuse(title, log.repeats)
        output, tensors = OutputForm.of(returned)
        result.output, result.returned = output, [(tensor.shape, tensor.dtype) for tensor in tensors]
        result.asking = _asking(fakes, log)
        result.switching = switches.found(log.repeats)
        chosen = next((tensors[output.names.index(name)] for name in setting.learns_from if name in output.names), None)
        outputs = tensors if chosen is None else (chosen,)
        functions, entries = _functions_of(outputs), log.entries
        result.reached = _reached(root, outputs, functions)
        log.entries = []  # what is looked at is no operation of the forward
        result.detached = _detached(root, functions, log)
        log.entries = entries
        if python_generators() != generators:
            raise CaptureError(
                f"forward of model {title} draws from Python's or numpy's random generator, whose state is not kept with a run; draw with "
                "torch, as by torch.rand(())"
            )
        if more := [where for where, number in num_hooks(root).items() if number > hooks[where]]:
            raise CaptureError(
                f"forward of model {title} registers a hook on {more[0]} whenever it runs, and the hooks add up from batch to batch; register "
                "it once, in the constructor"
            )
        after = _tensors_of(root)
        lasting = persistent | set(root.state_dict(keep_vars=True))
        beside[0].update((name, one) for name, one in own.items() if name not in lasting)
        beside[1].update((name, one) for name, one in after.items() if name not in lasting)
        check_tensors_stay(title, *({name: one for name, one in tensors.items() if name in lasting} for tensors in (own, after)))
        if setting.training:
            check_learning_stays(title, learns, after)
        # By way of `.data` no version changes: the operation has written into the storage, or the storage is another one.
        result.changed = {
            name
            for name, tensor in own.items()
            if after.get(name) is not tensor
            or version_of(tensor) != versions[name]
            or storages[name] in log.written_storages
            or tensor.untyped_storage()._cdata != storages[name]
        }
        result.written = {name for name in result.changed if isinstance(own[name], nn.Parameter)}
        changed, aliases = before.changed(root), _aliases(model, result.changed)
        if not changed and not aliases:
            return
        now, entries = attributes_of(root), log.entries

        def again() -> object:
            log.entries = []  # each forward may do as much
            return setting.form.call(root, samples)

        result.aliased = {key: alias for key, alias in aliases.items() if is_read(root, key, again)}
        after_one = Snapshot(root)
        try:
            again()
        except KnownValuesError:
            raise
        except Exception as error:  # as where the number that the first forward left is one that it does not take
            raise CaptureError(f"{setting.error_prefix(model)} again: {explain(error)}") from error
        changed_again = {*after_one.changed(root)}
        for key in sorted(changed):
            value = now.get(key)
            # What is computed once, from neither samples nor weights, is a cache.
            is_cache = holds_tensor(value) and key not in changed_again and not any(map(log.depends, tensors_in(value)))
            if is_cache or not is_read(root, key, again):
                result.left.add(key)
            elif holds_tensor(value) and key not in changed_again and _is_cache_of_weights(root, key, before, setting, samples):
                result.left.add(key)
                result.cached.add(key)
            elif is_kept(value):
                result.kept.add(key)
            else:
                what = "leaves a tensor in" if holds_tensor(value) else f"changes (a {type(value).__name__})"
                raise CaptureError(
                    f"forward of {_title(model, key[0])} {what} its attribute {key[1]!r}, which its next forward reads and which cannot be kept "
                    "with a run; keep it in a buffer of a fixed shape, or as numbers, text, lists and dicts"
                )
        log.entries = entries

    result.operations = setting.log(model, forward)
    _check_what_no_file_holds(model, setting, *beside)
    return result


def _check_what_no_file_holds(model: nn.Module, setting: Setting, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Refuse buffers that are in no file, and that a forward registers or gives another shape, where they depend on samples or weights.

    Others, as masks and tables for positions that are made anew for longer samples, are computed again wherever they are asked for.
    """
    forms = [{name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()} for tensors in (before, after)]
    if forms[0] == forms[1]:
        return
    fakes = setting.fakes(model)
    with fakes.context(), OperationLog([*fakes.samples, *fakes.root.parameters()]) as log:
        setting.form.call(fakes.root, fakes.samples)
        depending = {name for name, tensor in _tensors_of(fakes.root).items() if log.depends(tensor)}
    check_tensors_stay(
        type(model).__name__, *({name: one for name, one in tensors.items() if name in depending} for tensors in (before, after))
    )


def _asking(fakes: "Fakes", log: OperationLog) -> set[str]:
    """Return the modules that do something by values, those too that repeated what others did."""
    names, asking = {module: name for name, module in fakes.root.named_modules()}, set(fakes.unknown.asking)
    for block, other in log.repeats:
        asking |= {names[one] for one, another in zip(block.modules(), other.modules(), strict=True) if names[another] in asking}
    return asking


def _tensors_of(root: nn.Module) -> dict[str, Tensor]:
    return {**dict(root.named_parameters(remove_duplicate=False)), **dict(root.named_buffers(remove_duplicate=False))}


def _aliases(model: nn.Module, changed: Collection[str]) -> dict[Attribute, Alias]:
    """Return the Python attributes that are, or hold, parameters and buffers, tensors over their memory, or modules with such.

    Buffers that are there, and that no forward changes, are the same wherever they are read from.
    """
    own = _tensors_of(model)
    names = {
        tensor.untyped_storage()._cdata: name
        for name, tensor in own.items()
        if tensor.numel() and (isinstance(tensor, nn.Parameter) or tensor.is_meta or name in changed)
    }
    held = [(key, tensor) for key, value in attributes_of(model).items() for tensor in tensors_in(value)]
    found: dict[Attribute, Alias] = {}
    for key, tensor in held:
        has_storage = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if has_storage and (name := names.get(tensor.untyped_storage()._cdata)) is not None:
            first, is_itself, _ = found.get(key, Alias(name, True))
            found[key] = Alias(first, is_itself and any(tensor is one for one in own.values()))
    modules = {id(module): name for name, module in model.named_modules()}
    for key, value in attributes_of(model).items():
        inside = {modules[id(one)]: one for one in modules_in(value) if id(one) in modules}
        # A reference to what the module itself is in tells it where it is; its weights are read by their own names there.
        inside = {name: one for name, one in inside.items() if name and not f"{key[0]}.".startswith(f"{name}.")}
        weights = [f"{name}.{weight}" for name, one in inside.items() for weight, _ in one.named_parameters()]
        if weights and key not in found:
            found[key] = Alias(weights[0], True, tuple(inside))
    return found


def _is_cache_of_weights(
    root: nn.Module, key: Attribute, before: Snapshot, setting: Setting, samples: tuple[Tensor, ...]
) -> bool:
    """Decide whether an attribute holds what was computed of weights alone, and is as before once the model was in train mode.

    So do timm's LeViT and EfficientFormer with their attention's biases in eval mode: without a cache they compute the same.
    """
    set_mode(root, True)
    set_mode(root, setting.training)
    if key in before.changed(root):
        return False
    with OperationLog(samples) as log:
        setting.form.call(root, samples)
    return not any(map(log.depends, tensors_in(attributes_of(root).get(key))))


def _functions_of(outputs: tuple[Tensor, ...]) -> set[Any]:
    """Return the functions of the autograd graph of some outputs."""
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(stack)
    while stack:
        new = [inner for inner, _ in stack.pop().next_functions if inner is not None and inner not in seen]
        seen.update(new)
        stack.extend(new)
    return seen


def _reached(root: nn.Module, outputs: tuple[Tensor, ...], functions: Iterable[Any]) -> set[str]:
    """Return the names of the parameters in the autograd graph of some outputs."""
    found = {*map(id, outputs), *(id(getattr(function, "variable", None)) for function in functions)}
    return {name for name, parameter in root.named_parameters(remove_duplicate=False) if id(parameter) in found}


def _detached(root: nn.Module, functions: Iterable[Any], log: OperationLog) -> set[str]:
    """Return the names of the parameters that learn, and that functions of an autograd graph keep as tensors which do not."""
    learning = {
        parameter.untyped_storage()._cdata: parameter
        for parameter in root.parameters()
        if parameter.requires_grad and parameter.numel()
    }
    places: dict[type, list[str]] = {}
    kept: set[int] = set()
    for function in functions:
        names = places.setdefault(
            type(function), [name for name in dir(function) if name.startswith("_saved_") or name == "saved_tensors"]
        )
        for name in names:
            try:
                tensors = tensors_in(getattr(function, name))
            except RuntimeError:  # it was written into since, which the backward would tell
                continue
            for tensor in tensors:
                # A view that was made without gradients is a leaf of its own.
                if tensor.layout == torch.strided and (tensor.is_leaf or not tensor.requires_grad):
                    own = learning.get(tensor.untyped_storage()._cdata)
                    kept |= {id(own)} if own is not tensor else set()
    for block, other in log.repeats:
        kept |= {id(own) for own, theirs in zip(block.parameters(), other.parameters(), strict=True) if id(theirs) in kept}
    return {name for name, parameter in root.named_parameters(remove_duplicate=False) if id(parameter) in kept}


@contextmanager
def _made_by_module(root: nn.Module, log: OperationLog, made: Counter[str]) -> Iterator[None]:
    """Count for each module the bytes of the tensors that are made while it runs."""
    names = {module: name for name, module in root.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        made[names.get(module, "")] -= log.new_bytes

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        made[names.get(module, "")] += log.new_bytes

    with watching_calls(enter, leave):
        yield
    for block, other in log.repeats:
        for (inside, module), theirs in zip(block.named_modules(), other.modules(), strict=True):
            if inside:
                made[names[module]] += made[names[theirs]]
    made[""] = log.new_bytes


def explain(error: Exception) -> str:
    """Return in words why a forward did not run on fake tensors.

    Args:
        error: what it raised.
    """
    if isinstance(error, DataDependentOutputException):
        return "it reads a tensor's value (as by .item(), or in a condition), where capturing has shapes only"
    return first_line(error)


def _deepest_module(root: nn.Module, error: BaseException) -> str:
    """Return the name of the innermost module in whose method an exception was raised; nothing where that is the model itself."""
    names, found = {id(module): name for name, module in root.named_modules()}, ""
    traceback = error.__traceback__
    while traceback is not None:
        found = names.get(id(traceback.tb_frame.f_locals.get("self")), found) or found
        traceback = traceback.tb_next
    return found


def _title(model: nn.Module, name: str) -> str:
    return f"module {name!r} of {type(model).__name__}" if name else f"model {type(model).__name__}"
