"""The profiler: what each layer of a chain costs in memory, found with fake tensors: nothing is allocated.

Each layer runs alone, forward and backward, at two numbers of samples. Every moment of a run (the end of an operation) is matched
with the same moment of the other run, which gives its bytes as a straight line, and the highest of these lines at any number of
samples is the peak. A third number of samples checks it. The chain's own tensors are neither read nor changed.

    source --> layer --> sink     forward: the source is the boundary before, the sink the boundary after
           <--       <--          backward: the sink makes the gradient that comes in, the source keeps the one that goes out
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from lowmem_pnn.chain import Chain, Compiled, Layer, TensorSpec
from lowmem_pnn.costs import Affine, Envelope, LayerCost, MemoryProfile, by_itself
from lowmem_pnn.device.kernels import MAX_COMPILED, compiled, scratch_bytes
from lowmem_pnn.device.tracking import StorageTracker
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.likeness import likeness
from lowmem_pnn.optimizers import OptimizerSpec

# The two numbers of samples that are compared, and the one that checks. None is 1, which shapes and strides treat as a case of
# its own; the last is well apart, so that what does not grow in a straight line shows.
_FEW, _MORE, _MANY = 4, 6, 64


def profile(
    chain: Chain,
    *,
    optimizers: Sequence[OptimizerSpec],
    device: torch.device,
    parts_ties: bool = False,
    by_units: bool = False,
    known: "Known | None" = None,
) -> MemoryProfile:
    """Find what every layer of a chain costs.

    Args:
        chain: its tensors may be on the meta device; they are not read.
        optimizers: at least one; of several the largest is counted for all.
        device: where the chain will run; kernels differ between devices in what they save.
        parts_ties: layers that share a tensor may come into different partitions; it is then counted with each of them.
        by_units: every layer goes back from its own head before the next one runs forward.
        known: what earlier profiles of the same model, under other methods, have found; it is added to. Chains must still be there.

    Returns:
        The costs, layer by layer. A tensor that several layers share is counted with the first of them.

    Raises:
        ConfigError: a layer does not run on such samples.
    """
    known = {} if known is None else known
    with _modes_kept(chain), torch.random.fork_rng(devices=[]):
        counted: set[int] = set()
        layers = []
        smallest = 1
        compiled_kernels: dict[Hashable, int] = {}
        shared: set[int] = set()
        repeated: dict[int, int] = {}
        repeated_bytes = 0
        for number, layer in enumerate(chain.layers):
            if parts_ties:
                again = _new(layer.parameters().values(), set())
                again = [tensor for tensor in again if id(tensor) in shared]
                repeated |= {id(tensor): _nbytes(tensor) for tensor in again if tensor.requires_grad}
                learnt = [tensor for tensor in again if tensor.requires_grad]
                repeated_bytes += sum(map(_nbytes, again)) + sum(map(_nbytes, learnt)) + _state_bytes(learnt, optimizers)
                counted = set()
            before, after = chain.boundaries[number], chain.boundaries[number + 1]
            learns_input = number > 0 and not by_units
            # Code is a layer's own: it may be for other uses than that of a layer which is alike.
            key = likeness(layer), layer.compiled, before, after, device, learns_input
            if key not in known:
                known[key] = _Bench(layer, before, after, device, learns_input).found()
            found = known[key]
            cost = _price(layer, found, counted, optimizers, before, after)
            layers.append(by_itself(cost) if by_units else cost)
            shared |= counted
            compiled_kernels |= found.compiled
            smallest = max(smallest, found.smallest)
    forbidden = {cut for first, last in chain.tied_ranges for cut in range(first + 1, last + 1)}
    return MemoryProfile(
        layers=tuple(layers),
        forbidden_cuts=() if parts_ties else tuple(sorted(forbidden)),
        optimizer=", ".join(dict.fromkeys(map(str, optimizers))),
        smallest_micro_batch=smallest,
        kernel_bytes=sum(sorted(compiled_kernels.values(), reverse=True)[:MAX_COMPILED]),
        repeated_bytes=repeated_bytes,
        shared_bytes=sum(repeated.values()),
    )


def _price(
    layer: Layer,
    found: "_Found",
    counted: set[int],
    optimizers: Sequence[OptimizerSpec],
    before: tuple[TensorSpec, ...],
    after: tuple[TensorSpec, ...],
) -> LayerCost:
    """One layer's cost.

    Args:
        layer: the layer.
        found: of it, or of one that is alike.
        counted: identities of the tensors that layers before it have; this layer's are added.
        optimizers: that its parameters may have.
        before: the boundary that it takes.
        after: the boundary that it gives.
    """
    parameters = _new(layer.parameters().values(), counted)
    trainable = [parameter for parameter in parameters if parameter.requires_grad]

    def peak(moments: Callable[[_Runs], list[int]]) -> Envelope:
        return Envelope.over(moment for sizes in found.runs for moment in fit_peak(*map(moments, sizes)).moments)

    kepts = [fit_peak(*([run.kept] for run in sizes)).moments[-1] for sizes in found.runs]
    kept = Affine(max(kept.fixed for kept in kepts), max(kept.per_sample for kept in kepts))
    return LayerCost(
        name=layer.name,
        num_params=sum(parameter.numel() for parameter in parameters),
        weight_bytes=sum(map(_nbytes, parameters)),
        buffer_bytes=sum(map(_nbytes, _new(layer.buffers().values(), counted))),
        gradient_bytes=sum(map(_nbytes, trainable)),
        optimizer_bytes=_state_bytes(trainable, optimizers),
        step_bytes=max((optimizer.step_bytes(parameter) for optimizer in optimizers for parameter in trainable), default=0),
        forward_peak=peak(lambda runs: runs.forward),
        kept=kept,
        backward_peak=peak(lambda runs: runs.backward),
        emit_peak=peak(lambda runs: runs.emit),
        input_bytes=Affine(0, sum(spec.sample_bytes for spec in before)),
        output_bytes=Affine(0, sum(spec.sample_bytes for spec in after)),
        forward_macs=found.macs,
    )


@dataclass
class _Runs:
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
class _Found:
    """What the bench says of a layer, and of all that are alike.

    Args:
        runs: at `_FEW`, `_MORE` and `_MANY` samples; where there is code for it, without the code and with it.
        macs: multiply-accumulates of a forward, per sample.
        smallest: the fewest samples that it accepts in train mode.
        compiled: bytes of the code that is compiled for it, by its key.
    """

    runs: Sequence[tuple[_Runs, ...]]
    macs: int
    smallest: int
    compiled: Mapping[Hashable, int]


Known = dict[Hashable, _Found]
"""What was found of layers, by their likeness, boundaries and device."""


class _Timeline(StorageTracker):
    """Notes the live bytes at the end of every operation, with what its kernel held for the moment."""

    def __init__(self) -> None:
        super().__init__()
        self.moments = [0]
        self.compiled: dict[Hashable, int] = {}

    def _after(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        self.moments.append(self.live + scratch_bytes(func, args, result))
        self.compiled.update(compiled(func, args))


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


class _Bench:
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
        self._code: Compiled | None = None
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._tensors = self._fake({**layer.parameters(), **layer.buffers()})

    def found(self) -> _Found:
        """All that it can tell.

        Raises:
            ConfigError: the layer does not run.
        """
        # A layer with code runs without it now and then (one sample; rows in chunks), so that it costs the more of both.
        ways = [False] if self._layer.compiled is None else [False, True]
        runs = [tuple(self.measure(size, with_code) for size in (_FEW, _MORE, _MANY)) for with_code in ways]
        kernels = self._kernels[False] | self._kernels[True]
        return _Found(runs, self.count_macs(), 1 if self.accepts(1) else 2, kernels)

    def count_macs(self) -> int:
        """Multiply-accumulates of a forward in train mode, per sample.

        Eval mode may take fused kernels that are not in PyTorch's table of operations.
        """
        self._layer.module.train()
        with self._mode, torch.no_grad(), FlopCounterMode(display=False) as flops:
            self._run(*self._inputs(_FEW), scores=True)
        return int(flops.get_total_flops()) // 2 // _FEW

    def measure(self, batch: int, with_code: bool = False) -> _Runs:
        """Run the layer forward and backward in train mode, and forward in eval mode.

        Args:
            batch: number of samples.
            with_code: run what was compiled of it, where that applies.

        Raises:
            ConfigError: it does not run.
        """
        self._code = self._layer.compiled if with_code else None
        try:
            with self._mode, nullcontext() if self._code is None else self._code.rehearsing():
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

    def _train(self, batch: int) -> _Runs:
        self._layer.module.train()
        inputs = self._inputs(batch)
        learning = [number for number, tensor in enumerate(inputs) if self._learns_input and tensor.is_floating_point()]
        received: list[Tensor | None] = []
        runs = _Runs()
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


def fit_peak(few: list[int], more: list[int], many: list[int]) -> Envelope:
    """Bytes as a function of the number of samples, from those at `_FEW`, `_MORE` and `_MANY` samples, moment by moment.

    Args:
        few: live bytes at the moments of a run.
        more: the same moments with more samples.
        many: with many, as a check.

    Returns:
        Exact where every moment grows in a straight line; else not below what was measured.
    """
    if len(few) != len(more):
        # Another algorithm at another size: only the peaks can be compared.
        few, more = [max(few)], [max(more)]
    moments = []
    for low, high in zip(few, more, strict=True):
        # Negative where a backward has freed more than it has made, so far.
        slope = -(-(high - low) // (_MORE - _FEW))
        moments.append(Affine(max(low - slope * _FEW, high - slope * _MORE), slope))
    missing = max(many) - Envelope(tuple(moments)).at(_MANY)
    if missing > 0:
        moments.append(Affine(0, -(-max(many) // _MANY)))
    return Envelope.over(moments)


@contextmanager
def _modes_kept(chain: Chain) -> Iterator[None]:
    """Put train and eval mode of every module back at the end."""
    modes = {module: module.training for layer in chain.layers for module in layer.module.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _new(tensors: Iterable[Tensor], counted: set[int]) -> list[Tensor]:
    """The tensors that were not counted yet, each once; they are from now on."""
    found = []
    for tensor in tensors:
        if id(tensor) not in counted:
            counted.add(id(tensor))
            found.append(tensor)
    return found


def _state_bytes(parameters: Sequence[Tensor], optimizers: Sequence[OptimizerSpec]) -> int:
    return max(sum(map(optimizer.state_bytes, parameters)) for optimizer in optimizers)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
