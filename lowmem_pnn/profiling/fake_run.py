"""A bench of fake tensors: one layer runs on it, forward and backward, and the live bytes at the end of each operation are noted.

source --> layer --> sink     forward: the source is the boundary before, the sink the boundary after
<--       <--          backward: the sink makes the gradient that comes in, the source keeps the one that goes out
"""

from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lowmem_pnn.device.kernel_memory import cached_primitives, scratch_bytes
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.memory.storage_tracker import StorageTracker
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.model.layer import CompiledForward, Layer

# The two numbers of samples that are compared, and the one that checks. None is 1, which shapes and strides treat as a case of
# its own; the last is well apart, so that what does not grow in a straight line shows.
FEW, MORE, MANY = 4, 6, 64


@dataclass
class Runs:
    """A layer's runs at one number of samples: live bytes at the end of each operation, above what was live before the run.

    Args:
        forward: in train mode.
        kept: after it.
        backward: above `kept` and the gradient that comes in.
        emit: in eval mode, without gradients.
    """

    forward: list[int] = field(default_factory=lambda: [0])
    kept: int = 0
    backward: list[int] = field(default_factory=lambda: [0])
    emit: list[int] = field(default_factory=lambda: [0])


@dataclass(frozen=True)
class Found:
    """What the bench says of a layer, and of all that are alike.

    Args:
        runs: at `FEW`, `MORE` and `MANY` samples; where there is code for it, without the code and with it.
        macs: multiply-accumulates of a forward, per sample.
        smallest: the fewest samples that it accepts in train mode.
        compiled: bytes of the code that is compiled for it, by its key.
    """

    runs: Sequence[tuple[Runs, ...]]
    macs: int
    smallest: int
    compiled: Mapping[Hashable, int]


class _Timeline(StorageTracker):
    """Notes the live bytes at the end of every operation, with what its kernel held for the moment."""

    def __init__(self) -> None:
        super().__init__()
        self.moments = [0]
        self.compiled: dict[Hashable, int] = {}

    def _after_operation(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        self.moments.append(self.live + scratch_bytes(func, args, result))
        self.compiled.update(cached_primitives(func, args))


class _Source(torch.autograd.Function):
    """Where a layer's inputs come from: keeps their gradients, as the layer before would receive them, without a copy."""

    @staticmethod
    def forward(ctx: Any, kept: list[Tensor | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors, as results of an operation."""
        ctx.kept = kept
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        """Keep the gradients."""
        ctx.kept.extend(gradients)
        return (None,) * (1 + len(gradients))


class _Sink(torch.autograd.Function):
    """Where a layer's outputs go: makes their gradients only when backward begins, so that nobody else holds them."""

    @staticmethod
    def forward(ctx: Any, device: torch.device, *tensors: Tensor) -> Tensor:
        """A scalar."""
        ctx.like = [(tensor.shape, tensor.dtype) for tensor in tensors]
        ctx.device = device
        return torch.empty((), device=device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors' shapes."""
        return None, *(torch.empty(shape, dtype=dtype, device=ctx.device) for shape, dtype in ctx.like)


class FakeRun:
    """Runs one layer on fake tensors.

    Args:
        layer: its own tensors are not used.
        before: the boundary that it takes.
        after: the boundary that it gives.
        device: where its fake tensors pretend to be.
        learns_input: whether its inputs have gradients: not the model's own.
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
        # By whether the layer's own code ran.
        self._kernels: dict[bool, dict[Hashable, int]] = {False: {}, True: {}}
        self._code: CompiledForward | None = None
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._tensors = self._fake({**layer.parameters(), **layer.buffers()})

    def found(self) -> Found:
        """All that it can tell.

        Raises:
            ConfigError: the layer does not run.
        """
        # A layer with code runs without it now and then (one sample; rows in chunks), so that it costs the more of both.
        ways = [False] if self._layer.compiled is None else [False, True]
        runs = [tuple(self.measure(size, with_compiled_layers) for size in (FEW, MORE, MANY)) for with_compiled_layers in ways]
        kernels = self._kernels[False] | self._kernels[True]
        return Found(runs, self.count_macs(), 1 if self.accepts(1) else 2, kernels)

    def count_macs(self) -> int:
        """Multiply-accumulates of a forward in train mode, per sample.

        Eval mode may take fused kernels that are not in PyTorch's table of operations.
        """
        self._layer.module.train()
        with self._mode, torch.no_grad(), FlopCounterMode(display=False) as flops:
            self._run(*self._inputs(FEW), scores=True)
        return int(flops.get_total_flops()) // 2 // FEW

    def measure(self, batch: int, with_compiled_layers: bool = False) -> Runs:
        """Run the layer forward and backward in train mode, and forward in eval mode.

        Args:
            batch: number of samples.
            with_compiled_layers: run what was compiled of it, where that applies.

        Raises:
            ConfigError: it does not run.
        """
        self._code = self._layer.compiled if with_compiled_layers else None
        try:
            with self._mode, nullcontext() if self._code is None else self._code.accepting_fake_tensors():
                runs = self._train(batch)
                runs.emit = self._emit(batch)
                return runs
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            samples = " and ".join(map(str, self.before))
            raise ConfigError(
                f"layer {self._layer.name!r} does not run forward and backward on {batch} samples of {samples}: "
                f"{type(error).__name__}: {reason}; its memory cannot be foreseen, mend its forward"
            ) from error
        finally:
            self._code = None

    def accepts(self, batch: int) -> bool:
        """Whether the layer runs on so few samples in train mode: BatchNorm over single values does not."""
        self._layer.module.train()
        try:
            with self._mode, torch.no_grad():
                self._run(*self._inputs(batch), scores=True)
        except ValueError:
            return False
        return True

    def _train(self, batch: int) -> Runs:
        self._layer.module.train()
        inputs = self._inputs(batch)
        learning = [number for number, tensor in enumerate(inputs) if self._learns_input and tensor.is_floating_point()]
        received: list[Tensor | None] = []
        runs = Runs()
        with torch.enable_grad():
            leaves = [inputs[number].requires_grad_() for number in learning]
            for number, tensor in zip(learning, _Source.apply(received, *leaves) if leaves else (), strict=True):
                inputs[number] = tensor
            with _Timeline() as timeline:
                outputs = self._run(*inputs, scores=True)
                runs.forward = timeline.moments
                runs.kept = timeline.live
            learnt = [tensor for tensor in outputs if tensor.requires_grad]
            if not learnt:
                return runs
            # Outside of the timeline: no layer's work.
            end = _Sink.apply(self._device, *learnt)
            begin = torch.ones_like(end)
            timeline.moments = []
            coming = sum(tensor.nbytes for tensor in learnt)
            with timeline:
                torch.autograd.backward(end, begin)
            self._kernels[self._code is not None] = timeline.compiled
            # The first moments are the making of the gradient that comes in.
            runs.backward = [0, *(live - runs.kept - coming for live in timeline.moments)]
        for tensor in self._tensors.values():
            tensor.grad = None
        return runs

    def _emit(self, batch: int) -> list[int]:
        self._layer.module.eval()
        inputs = self._inputs(batch)
        timeline = _Timeline()
        with torch.no_grad(), timeline:
            self._run(*inputs)
        # Of one number of samples: the last measured.
        self._kernels[self._code is not None] |= {("eval", key): nbytes for key, nbytes in timeline.compiled.items()}
        return timeline.moments

    def _run(self, *inputs: Tensor, scores: bool = False) -> tuple[Tensor, ...]:
        """Its outputs; or, if it has a head, the head's scores."""
        made = None if self._code is None else self._code(self._layer.module.training, self._tensors, inputs)
        if made is None:
            return self._layer.run_on(self._tensors, *inputs, scores=scores)
        return self._layer.scores_on(self._tensors, made) if scores else made

    def _inputs(self, batch: int) -> list[Tensor]:
        return [torch.empty((batch, *spec.shape), dtype=spec.dtype, device=self._device) for spec in self.before]

    def _fake(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Fake tensors of the same shapes; names of one tensor stay names of one tensor."""
        fakes: dict[int, Tensor] = {}
        with self._mode:
            for tensor in tensors.values():
                if id(tensor) not in fakes:
                    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)
                    fakes[id(tensor)] = fake.requires_grad_(tensor.requires_grad)
        return {name: fakes[id(tensor)] for name, tensor in tensors.items()}
