"""The model's own forward on fake tensors, which have shapes but no values: the operations it does, and what it leaves in its modules.

What the forward does is compared with what its trace does; what it leaves behind decides which modules may be opened and which Python
state has to be kept. Nothing is allocated, but for small tensors that depend on sizes and constants alone.
"""

import logging
import pickle
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lowmem_pnn.capture.dispatch_modes import KnownValues, KnownWrittenError, OperationLog, tensors_in
from lowmem_pnn.capture.equal_blocks import EqualBlocks
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.call_form import ONE_TENSOR, CallForm, OutputForm, TensorSpec
from lowmem_pnn.model.copies import copy_structure, first_line, preserve_random_state, set_mode
from lowmem_pnn.model.parameter_hooks import num_hooks
from lowmem_pnn.model.precision import Precision
from lowmem_pnn.model.python_state import (
    Attribute,
    Snapshot,
    attributes_of,
    holds_tensor,
    is_kept,
    is_read,
)


@dataclass(frozen=True)
class Setting:
    """How a model is run on fake tensors.

    Args:
        specs: shape and type of each tensor of a sample.
        precision: compute precision and memory format.
        batch: number of samples.
        training: whether in train mode.
        form: how the tensors are handed to the model.
        learns_from: names of outputs, the first of which that there is training learns from; empty where it may learn from all.
        values: whether what depends on sizes and constants alone has values, by which a forward may decide.
    """

    specs: tuple[TensorSpec, ...]
    precision: Precision
    batch: int
    training: bool
    form: CallForm = ONE_TENSOR
    learns_from: tuple[str, ...] = ()
    values: bool = True

    @property
    def mode_text(self) -> str:
        """The mode in words."""
        return "train" if self.training else "eval"

    @property
    def has_values(self) -> bool:
        """Whether tensors that depend on sizes and constants alone are no fake ones."""
        return self.values and self._device == "cpu"

    @property
    def _device(self) -> str:
        return "cpu" if self.precision.dtype == "fp32" else self.precision.device_type

    def error_prefix(self, model: nn.Module) -> str:
        """Return the beginning of the error of a model that does not run.

        Args:
            model: the user's model.
        """
        many = len(self.specs) > 1
        samples = ", ".join(
            f"{name!r} {spec}" if many else str(spec) for name, spec in zip(self.form.names, self.specs, strict=True)
        )
        maps = ", its maps channels last (--channels-last)" if self.precision.channels_last else ""
        return f"model {type(model).__name__} does not run on samples of {samples} in {self.mode_text} mode{maps}"

    def log(
        self, model: nn.Module, forward: Callable[[nn.Module, tuple[Tensor, ...], OperationLog], Any]
    ) -> list[tuple[Any, ...]]:
        """Run something on a copy of the model with fake tensors, and return the operations that depend on them.

        Args:
            model: module that stays as it is.
            forward: is given the copy, in its mode, the samples, and the log.
        """
        fakes = self.fakes(model)
        log = OperationLog([*fakes.samples, *fakes.root.parameters(), *fakes.root.buffers()])
        with fakes.context(), log:
            forward(fakes.root, fakes.samples, log)
        return log.entries

    def fakes(self, model: nn.Module) -> "Fakes":
        """Return a copy of the model with fake tensors, in its mode, and fake samples.

        All fake tensors are on the CPU, wherever the model's are; under autocast, whose casts depend on the device, on the training device.

        Args:
            model: module that stays as it is.
        """
        device = self._device
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            samples = tuple(torch.empty((self.batch, *spec.shape), dtype=spec.dtype, device=device) for spec in self.specs)
            samples = self.precision.to_memory_format(samples)
            fakes: dict[int, Tensor] = {}
            for tensor in [*model.parameters(), *model.buffers()]:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
        root = copy_structure(model, fakes)
        set_mode(root, self.training)
        EqualBlocks(model, root)
        has_values = self.values and device == "cpu"
        return Fakes(
            mode, root, samples, self.precision, KnownValues(self.precision.device_type) if has_values else nullcontext()
        )


@dataclass
class Fakes:
    """A copy of a model with fake tensors, and fake samples.

    Args:
        mode: the mode that they belong to.
        root: the copy.
        samples: tensors of a batch.
        precision: compute precision and memory format.
        known: mode that gives values to what does not depend on samples or weights.
    """

    mode: FakeTensorMode
    root: nn.Module
    samples: tuple[Tensor, ...]
    precision: Precision
    known: AbstractContextManager[Any]

    @contextmanager
    def context(self) -> Iterator[None]:
        """Return the context in which the copy is run."""
        with (
            preserve_random_state(),
            _fake_tensor_log_disabled(),
            self.mode,
            self.known,
            torch.enable_grad(),
            self.precision.autocast(),
        ):
            yield


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
        returns_tensor: whether the model returns one tensor, in nothing.
        reached: parameters that a backward from what training learns from gives a gradient to.
    """

    setting: Setting
    operations: list[tuple[Any, ...]]
    kept: set[Attribute] = field(default_factory=set)
    left: set[Attribute] = field(default_factory=set)
    cached: set[Attribute] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    changed: set[str] = field(default_factory=set)
    made: Counter[str] = field(default_factory=Counter)
    returns_tensor: bool = True
    reached: set[str] = field(default_factory=set)


def run_model(model: nn.Module, setting: Setting) -> ModelRun:
    """Run a model on fake tensors.

    Args:
        model: module that stays as it is.
        setting: how to run it.

    Raises:
        CaptureError: it does not take such samples, reads a value, draws from a generator whose state is not kept, or leaves something
            in its modules that its next forward reads and that cannot be kept.
        KnownWrittenError: it writes into a tensor whose values are known what is not known.
    """
    result = ModelRun(setting, [])
    title = type(model).__name__

    def forward(root: nn.Module, samples: tuple[Tensor, ...], log: OperationLog) -> None:
        before, generators, hooks = Snapshot(root), _python_generators(), num_hooks(root)
        own = _tensors_of(root)
        versions = {name: tensor._version for name, tensor in own.items()}
        try:
            with _made_by_module(root, log, result.made):
                returned = setting.form.call(root, samples)
        except KnownWrittenError:
            raise
        except Exception as error:  # whatever a user's module raises on a shape it does not take
            where = _deepest_module(root, error)
            raise CaptureError(f"{setting.error_prefix(model)}{where and f', at {where!r}'}: {explain(error)}") from error
        result.returns_tensor = isinstance(returned, Tensor)
        output, tensors = OutputForm.of(returned)
        chosen = next((tensors[output.names.index(name)] for name in setting.learns_from if name in output.names), None)
        result.reached = _reached(root, tensors if chosen is None else (chosen,))
        if _python_generators() != generators:
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
        result.changed = {
            name for name, tensor in own.items() if after.get(name) is not tensor or tensor._version != versions[name]
        }
        result.written = {name for name in result.changed if isinstance(own[name], nn.Parameter)}
        changed = before.changed(root)
        if not changed:
            return
        now = attributes_of(root)
        log.entries, entries = [], log.entries
        after_one = Snapshot(root)
        setting.form.call(root, samples)
        changed_again = {*after_one.changed(root)}
        for key in sorted(changed):
            value = now.get(key)
            # What is computed once, from neither samples nor weights, is a cache.
            is_cache = holds_tensor(value) and key not in changed_again and not any(map(log.depends, tensors_in(value)))
            if is_cache or not is_read(root, key, lambda: setting.form.call(root, samples)):
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
    return result


def _tensors_of(root: nn.Module) -> dict[str, Tensor]:
    return {**dict(root.named_parameters(remove_duplicate=False)), **dict(root.named_buffers(remove_duplicate=False))}


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


def _reached(root: nn.Module, outputs: tuple[Tensor, ...]) -> set[str]:
    """Return the names of the parameters in the autograd graph of some outputs."""
    stack = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen, found = set(stack), {id(output) for output in outputs}
    while stack:
        function = stack.pop()
        found.add(id(getattr(function, "variable", None)))
        new = [inner for inner, _ in function.next_functions if inner is not None and inner not in seen]
        seen.update(new)
        stack.extend(new)
    return {name for name, parameter in root.named_parameters(remove_duplicate=False) if id(parameter) in found}


@contextmanager
def _made_by_module(root: nn.Module, log: OperationLog, made: Counter[str]) -> Iterator[None]:
    """Count for each module the bytes of the tensors that are made while it runs."""
    names = {module: name for name, module in root.named_modules()}

    def enter(module: nn.Module, args: Any) -> None:
        made[names.get(module, "")] -= log.new_bytes

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        made[names.get(module, "")] += log.new_bytes

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for block, other in log.repeats:
        for (inside, module), theirs in zip(block.named_modules(), other.modules(), strict=True):
            if inside:
                made[names[module]] += made[names[theirs]]
    made[""] = log.new_bytes


def uses_checkpointing(model: nn.Module, setting: Setting) -> bool:
    """Decide whether a model's forward calls `torch.utils.checkpoint`.

    Args:
        model: module that stays as it is.
        setting: how to run it.
    """
    found = False

    def look(frame: Any, event: str, argument: object) -> None:
        nonlocal found
        found = found or frame.f_code.co_filename.endswith("torch/utils/checkpoint.py")

    def forward(root: nn.Module, samples: tuple[Tensor, ...], log: OperationLog) -> None:
        previous = sys.getprofile()
        sys.setprofile(look)
        try:
            setting.form.call(root, samples)
        except Exception:  # only what was called is asked
            pass
        finally:
            sys.setprofile(previous)

    setting.log(model, forward)
    return found


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


def _python_generators() -> tuple[Any, ...]:
    return random.getstate(), pickle.dumps(np.random.get_state(legacy=False))


@contextmanager
def _fake_tensor_log_disabled() -> Iterator[None]:
    """Keep torch from logging the traceback of an operation that does not take its shapes: it is in the error that we raise."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
