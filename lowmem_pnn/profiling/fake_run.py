"""Runs of one layer on fake tensors, forward and backward, that record the live bytes at the end of each operation.

source --> layer --> sink     forward: the source is the boundary before the layer, the sink the boundary after it
       <--       <--          backward: the sink makes the incoming gradient, the source keeps the outgoing one
"""

from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lowmem_pnn.capture.unknown_values import UnknownValues
from lowmem_pnn.device.kernel_memory import cached_primitives, product_width, scratch_bytes, untouched_bytes, workspace_bytes
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.memory.storage_tracker import StorageTracker
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.model.layer import CompiledForward, Layer
from lowmem_pnn.profiling.costs import Product
from lowmem_pnn.profiling.products import products_counted

# Two numbers of samples that are compared, and one that checks. None is 1, which shapes and strides treat as a case of its own; the
# last is far from the others, so that bytes which do not grow in a straight line show.
FEW, MORE, MANY = 4, 6, 64


@dataclass
class MemoryTrace:
    """Live bytes at the end of each operation of a layer's runs, at one number of samples, above those before the run.

    Args:
        forward: Live bytes of a forward in train mode.
        kept: Live bytes after the forward.
        backward: Live bytes of the backward, above `kept` and the incoming gradient.
        complete: Live bytes, above these too, when the last gradient of the layer's parameters is there.
        emit: Live bytes of a forward in eval mode, without gradients.
    """

    forward: list[int] = field(default_factory=lambda: [0])
    kept: int = 0
    backward: list[int] = field(default_factory=lambda: [0])
    complete: int = 0
    emit: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class LayerMeasurement:
    """Measurement of a layer on fake tensors; it holds for every layer with the same fingerprint and boundaries.

    Args:
        traces: Traces at `FEW`, `MORE` and `MANY` samples; of a compiled layer, those of its module and those of its compiled code.
        macs: Multiply-accumulates of a forward, per sample.
        products: Products of a forward in train mode.
        smallest: Fewest samples that the layer accepts in train mode.
        compiled: Bytes of the kernels that are compiled for the layer in training, by their keys.
        emitting: Bytes of those that are compiled for its forward in eval mode.
        untouched: Most bytes that one of its kernels takes from the system without using them.
        widest: Largest width of its matrix products (`kernel_memory.product_width`).
    """

    traces: Sequence[tuple[MemoryTrace, ...]]
    macs: int
    products: tuple[Product, ...]
    smallest: int
    compiled: Mapping[Hashable, int]
    emitting: Mapping[Hashable, int]
    untouched: int = 0
    widest: int = 0


class _LiveBytes(StorageTracker):
    """Recorder of the live bytes at the end of every operation, with the scratch memory of its kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.moments = [0]
        self.compiled: dict[Hashable, int] = {}
        self.untouched, self.widest = 0, 0

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if kept := workspace_bytes(func, args):
            *others, _ = result
            result = (*others, torch.empty(kept, dtype=torch.uint8, device=args[0].device))
        return result

    def _after_operation(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        self.moments.append(self.live + scratch_bytes(func, args, result))
        self.compiled.update(cached_primitives(func, args))
        self.untouched = max(self.untouched, untouched_bytes(func, args))
        self.widest = max(self.widest, product_width(func, args))


class _NoModules(nullcontext[None]):
    """Stands in the place of a counter's tracker of modules: everything belongs to the whole."""

    parents = frozenset({"Global"})


class _Source(torch.autograd.Function):
    """Source of a layer's inputs: keeps their gradients as the layer before would receive them, without a copy."""

    @staticmethod
    def forward(ctx: Any, kept: list[Tensor | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the tensors as results of an operation."""
        ctx.kept = kept
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        """Keep the gradients."""
        ctx.kept.extend(gradients)
        return (None,) * (1 + len(gradients))


class _Sink(torch.autograd.Function):
    """Sink of a layer's outputs: makes their gradients only when backward begins, so that nothing else holds them."""

    @staticmethod
    def forward(ctx: Any, device: torch.device, *tensors: Tensor) -> Tensor:
        """Return a scalar."""
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in tensors]
        ctx.device = device
        return torch.empty((), device=device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Make gradients of the tensors' shapes."""
        return None, *(torch.empty(shape, dtype=dtype, device=ctx.device) for shape, dtype in ctx.like)


class FakeRun:
    """Runs of one layer on fake tensors.

    Args:
        layer: The layer; its own tensors are not used.
        before: Boundary before the layer.
        after: Boundary after the layer.
        device: Device that the fake tensors pretend to be on.
        learns_input: Whether the layer's inputs have gradients; those of the model have none.
    """

    def __init__(
        self,
        layer: Layer,
        before: tuple[TensorSpec, ...],
        after: tuple[TensorSpec, ...],
        device: torch.device,
        learns_input: bool,
    ) -> None:
        self._layer = layer
        self.before = before
        self.after = after
        self._device = device
        self._learns_input = learns_input
        # Compiled kernels, by whether the layer's compiled code ran.
        self._kernels: dict[bool, dict[Hashable, int]] = {False: {}, True: {}}
        self._emitting: dict[bool, dict[Hashable, int]] = {False: {}, True: {}}
        self._untouched, self._widest = 0, 0
        self._code: CompiledForward | None = None
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._tensors = self._fake({**layer.parameters(), **layer.buffers()})

    def measure(self) -> LayerMeasurement:
        """Measure the layer.

        Raises:
            ConfigError: The layer does not run.
        """
        # A compiled layer runs as a module at times (one sample; rows in chunks), so that its cost is the greater of both.
        ways = [False] if self._layer.compiled is None else [False, True]
        traces = [tuple(self.trace(size, compiled=compiled) for size in (FEW, MORE, MANY)) for compiled in ways]
        kernels, emitting = self._kernels[False] | self._kernels[True], self._emitting[False] | self._emitting[True]
        smallest = 1 if self.accepts(1) else 2
        macs, products = self.count_macs()
        return LayerMeasurement(traces, macs, products, smallest, kernels, emitting, self._untouched, self._widest)

    def count_macs(self) -> tuple[int, tuple[Product, ...]]:
        """Count the multiply-accumulates of a forward in train mode, per sample, and collect its products.

        Eval mode may take fused kernels that are not in PyTorch's table of operations.
        """
        self._layer.train()
        # Detached: a view of a parameter asks for a gradient without gradients too, and the counter's hooks look for its function.
        tensors = {name: tensor.detach() for name, tensor in self._tensors.items()}
        try:
            return self._count_macs(tensors)
        except RuntimeError:  # a forward that takes gradients by its weights
            return self._count_macs(dict(self._tensors))

    def _count_macs(self, tensors: dict[str, Tensor]) -> tuple[int, tuple[Product, ...]]:
        flops = FlopCounterMode(display=False)
        # Its tracker of modules hangs hooks on gradients, which a forward that calls torch.autograd.grad cannot bear.
        flops.mod_tracker = cast(Any, _NoModules())
        with self._mode, UnknownValues(), torch.no_grad(), flops, products_counted(FEW) as products:
            self._layer.run_on(tensors, *self._inputs(FEW), scores=True)
        return int(flops.get_total_flops()) // 2 // FEW, tuple(products)

    def trace(self, batch: int, *, compiled: bool = False) -> MemoryTrace:
        """Run the layer forward and backward in train mode, and forward in eval mode.

        Args:
            batch: Number of samples.
            compiled: Whether to run the layer's compiled code, where that takes the inputs.

        Raises:
            ConfigError: The layer does not run.
        """
        self._code = self._layer.compiled if compiled else None
        try:
            with self._mode, UnknownValues(), nullcontext() if self._code is None else self._code.accepting_fake_tensors():
                trace = self._train(batch)
                trace.emit = self._emit(batch)
                return trace
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            samples = " and ".join(map(str, self.before))
            # An error of a class of its own, or in older versions a RuntimeError.
            mismatch = type(error).__name__ == "FakeTensorDeviceMismatchError" or "two different devices" in reason
            if mismatch and "meta" in reason:
                raise ConfigError(
                    f"the backward of layer {self._layer.name!r} reads weights by itself, as a hook or an autograd.Function that holds on to "
                    "modules does: they are others by then; compute what it needs in the forward, and save that for it"
                ) from error
            raise ConfigError(
                f"layer {self._layer.name!r} does not run forward and backward on {batch} samples of {samples}: "
                f"{type(error).__name__}: {reason}; its memory cannot be foreseen, mend its forward"
            ) from error
        finally:
            self._code = None

    def accepts(self, batch: int) -> bool:
        """Decide whether the layer runs on `batch` samples in train mode: BatchNorm over single values does not."""
        self._layer.train()
        try:
            with self._mode, UnknownValues(), torch.no_grad():
                self._run(*self._inputs(batch), scores=True)
        except ValueError:
            return False
        return True

    def _train(self, batch: int) -> MemoryTrace:
        self._layer.train()
        inputs = self._inputs(batch)
        learning = [number for number, spec in enumerate(self.before) if self._learns_input and spec.takes_gradient]
        received: list[Tensor | None] = []
        trace = MemoryTrace()
        with torch.enable_grad():
            leaves = [inputs[number].requires_grad_() for number in learning]
            for number, tensor in zip(learning, _Source.apply(received, *leaves) if leaves else (), strict=True):
                inputs[number] = tensor
            with _LiveBytes() as live_bytes:
                outputs = self._run(*inputs, scores=True)
                trace.forward = live_bytes.moments
                trace.kept = live_bytes.live
            learnt = [tensor for tensor in outputs if tensor.requires_grad]
            if not learnt:
                return trace
            # Not recorded: no work of the layer.
            end = _Sink.apply(self._device, *learnt)
            begin = torch.ones_like(end)
            live_bytes.moments = []
            incoming = sum(tensor.nbytes for tensor in learnt)
            completed = [0]
            learners = {id(tensor): tensor for tensor in self._tensors.values() if tensor.requires_grad}
            hooks = [
                tensor.register_post_accumulate_grad_hook(lambda _: completed.append(live_bytes.live))
                for tensor in learners.values()
            ]
            with live_bytes:
                torch.autograd.backward(end, begin)
            for hook in hooks:
                hook.remove()
            trace.complete = completed[-1] - trace.kept - incoming
            self._kernels[self._code is not None] = live_bytes.compiled
            self._untouched = max(self._untouched, live_bytes.untouched)
            self._widest = max(self._widest, live_bytes.widest)
            # The first moments are the making of the incoming gradient.
            trace.backward = [0, *(live - trace.kept - incoming for live in live_bytes.moments)]
        for tensor in self._tensors.values():
            tensor.grad = None
        return trace

    def _emit(self, batch: int) -> list[int]:
        self._layer.eval()
        inputs = self._inputs(batch)
        live_bytes = _LiveBytes()
        with torch.no_grad(), live_bytes:
            self._run(*inputs)
        # Kernels of one number of samples are kept: the last one measured.
        self._emitting[self._code is not None] = live_bytes.compiled
        return live_bytes.moments

    def _run(self, *inputs: Tensor, scores: bool = False) -> tuple[Tensor, ...]:
        """Return the layer's outputs; with `scores` those of its head, if it has one."""
        made = None if self._code is None else self._code(self._layer.module.training, self._tensors, inputs)
        if made is None:
            return self._layer.run_on(dict(self._tensors), *inputs, scores=scores)
        return self._layer.scores_on(self._tensors, made[0]) if scores else made[0]

    def _inputs(self, batch: int) -> list[Tensor]:
        return [torch.empty((batch, *spec.shape), dtype=spec.dtype, device=self._device) for spec in self.before]

    def _fake(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make fake tensors of the same shapes; names of one tensor stay names of one tensor."""
        fakes: dict[int, Tensor] = {}
        with self._mode:
            for tensor in tensors.values():
                if id(tensor) not in fakes:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)
                    fakes[id(tensor)] = fake.requires_grad_(tensor.requires_grad)
        return {name: fakes[id(tensor)] for name, tensor in tensors.items()}
