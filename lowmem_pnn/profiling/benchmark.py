"""MachineTimings: how fast this machine runs a model's layers, steps its optimizer, and moves bytes. Measured, not assumed.

Each layer runs alone on tensors of random values, forward and back, at few samples and at as many as time, memory and the plans allow;
layers that are alike are timed once, the expensive ones first. Between and beyond the two numbers of samples time is taken to grow in
a straight line. The chain's own tensors are neither read nor changed.
"""

import math
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lowmem_pnn.device import Device, is_out_of_memory
from lowmem_pnn.errors import DiskError
from lowmem_pnn.memory.aligned import aligned_empty
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.model.fingerprint import layer_fingerprint
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.profiling.costs import Affine, MemoryProfile, peak_of
from lowmem_pnn.profiling.timings import LayerSeconds, Seconds
from lowmem_pnn.stores.tensor_file import TensorFile

SECONDS = 2.0
"""For the layers of a chain; with the rest of the machine about half a second more."""

# Times these by the wall's clock it is enough, on a machine that is busy with something else.
_PATIENCE = 4.0
# Samples of the small run, where what a call costs shows; and of one between, from which follows how many there is time for.
_FEW, _BETWEEN = 2, 8
# Runs at the large number of samples, in units of one forward and backward: one to warm up, two that count, and those without the
# inputs' gradient and in eval mode, which are shorter.
_RUNS = 5.0
# Multiply-accumulates that take as long as going through one weight, forward and back, whatever the samples.
_MACS_OF_A_WEIGHT = 40
_STEPPED, _MOVED, _TOUCHED = 1_000_000, 16_000_000, 8_000_000
_REPEATS = 3
_FLOAT_BYTES = 4


@dataclass
class LayerBenchmark:
    """Times layers; what it has found of a layer holds for all that are alike, in other chains too while these are there.

    Args:
        device: open.
        seconds: for the layers of one chain.
    """

    device: Device
    seconds: float = SECONDS
    _known: dict[Hashable, LayerSeconds] = field(default_factory=dict)
    _machine: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._clock = clock_of(self.device)

    def layers(
        self, chain: Chain, profile: MemoryProfile, most: int, *, per_layer_loss: bool = False
    ) -> tuple[tuple[LayerSeconds, ...], float]:
        """How long each layer of a chain takes.

        Args:
            chain: the model.
            profile: what its layers need: a layer is run with as many samples as fit the budget by itself.
            most: samples at once, of the plans that are to be forecast.
            per_layer_loss: a layer goes back from its head's scores.

        Returns:
            For each layer; and the share of the multiply-accumulates that was timed, the others being estimated from these.
        """
        kinds = [
            (layer_fingerprint(layer), chain.boundaries[number], number > 0 and not per_layer_loss, per_layer_loss)
            for number, layer in enumerate(chain.layers)
        ]
        macs = [max(1, cost.forward_macs) for cost in profile.layers]
        first = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
        efforts = [own * most + _MACS_OF_A_WEIGHT * cost.num_params for own, cost in zip(macs, profile.layers, strict=True)]
        # The expensive ones first: those that there is no time for matter least.
        wanted = sorted(
            (number for kind, number in first.items() if kind not in self._known), key=lambda number: -efforts[number]
        )
        left, began, latest = (
            sum(efforts[number] for number in wanted),
            self._clock(),
            time.monotonic() + _PATIENCE * self.seconds,
        )
        with _nothing_changed(chain):
            for number in wanted:
                remaining = self.seconds - (self._clock() - began)
                if remaining <= 0 or time.monotonic() > latest:
                    break
                share = remaining * efforts[number] / left
                left -= efforts[number]
                found = self._time(chain, number, profile, most, share, per_layer_loss=per_layer_loss)
                if found is not None:
                    self._known[kinds[number]] = found
        timed = {number for number, kind in enumerate(kinds) if kind in self._known}
        layers = tuple(
            self._known[kind] if kind in self._known else _estimate(number, profile, {at: self._known[kinds[at]] for at in timed})
            for number, kind in enumerate(kinds)
        )
        return layers, sum(macs[number] for number in timed) / sum(macs)

    def machine(self, optimizer: OptimizerSpec, folder: Path) -> tuple[float, float, float, float]:
        """See `machine`; measured once for each optimizer, in half of the budget."""
        if optimizer.name not in self._machine:
            room = (self.device.budget_bytes - self.device.reserve_bytes) // 2
            self._machine[optimizer.name] = machine(self.device, optimizer, folder, room)
        return self._machine[optimizer.name]

    def _time(
        self, chain: Chain, number: int, profile: MemoryProfile, most: int, seconds: float, *, per_layer_loss: bool
    ) -> LayerSeconds | None:
        """A layer's times; None where it does not run here by itself."""
        cost, smallest = profile.layers[number], profile.smallest_micro_batch
        room = self.device.budget_bytes - self.device.reserve_bytes - max(0, self.device.used_bytes())

        def fits(samples: int) -> bool:
            return peak_of([cost], samples, samples, Affine(0, cost.output_bytes.per_sample)) <= room

        began, few = self._clock(), max(smallest, min(_FEW, most))
        if not fits(few):
            return None
        runner = _Runner(
            chain.layers[number],
            chain.boundaries[number],
            self.device,
            learns_input=number > 0 and not per_layer_loss,
            per_layer_loss=per_layer_loss,
        )
        try:
            short = runner.best(few, 1)
            many, long = few, short
            between = min(_BETWEEN, most)
            if between > few and fits(between) and sum(short) * between / few <= max(seconds, 0.1):
                many, long = between, runner.best(between, 1)
                left = seconds - (self._clock() - began)
                line = _line(few, sum(short), between, sum(long))
                while many < most and _RUNS * line.at(min(2 * many, most)) <= left and fits(min(2 * many, most)):
                    many = min(2 * many, most)
                if many > between:
                    long = runner.best(many, 2)
            alone = runner.run(many, learns_input=False)[1] if runner.learns_input else long[1]
            emit = runner.emit(many)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        forward, backward = (_line(few, low, many, high) for low, high in zip(short, long, strict=True))
        return LayerSeconds(forward, backward, _scaled(backward, alone / long[1]), _scaled(forward, emit / long[0]))


class _Runner:
    """Runs a layer on tensors of its own."""

    def __init__(
        self, layer: Layer, before: Sequence[TensorSpec], device: Device, *, learns_input: bool, per_layer_loss: bool
    ) -> None:
        self._layer, self._before, self._device, self._by_units = layer, before, device, per_layer_loss
        self.learns_input = learns_input
        self._random = torch.Generator(device.torch_device).manual_seed(0)
        made: dict[int, Tensor] = {}
        for tensor in [*layer.parameters().values(), *layer.buffers().values()]:
            if id(tensor) not in made:
                made[id(tensor)] = self._like(tensor)
        self._tensors = {name: made[id(tensor)] for name, tensor in {**layer.parameters(), **layer.buffers()}.items()}

    def best(self, samples: int, times: int) -> tuple[float, float]:
        """Seconds of forward and backward, the least of several runs after one that warms up."""
        self.run(samples, learns_input=self.learns_input)
        runs = [self.run(samples, learns_input=self.learns_input) for _ in range(times)]
        return min(forward for forward, _ in runs), min(backward for _, backward in runs)

    def run(self, samples: int, *, learns_input: bool) -> tuple[float, float]:
        """Seconds of forward and of backward in train mode."""
        self._layer.module.train()
        inputs = [tensor.requires_grad_(learns_input and tensor.is_floating_point()) for tensor in self._inputs(samples)]
        if self._device.shares_host:
            # Activations of a whole partition take fresh pages, which the system has to zero; a layer alone would use its own again.
            self._device.release()
        with torch.enable_grad():
            outputs: tuple[Tensor, ...] = ()

            def forward() -> None:
                nonlocal outputs
                outputs = self._layer.run_on(self._tensors, *inputs, scores=self._by_units)

            there = self._timed(forward)
            learnt = [tensor for tensor in outputs if tensor.requires_grad]
            gradients = [torch.full_like(tensor, 1e-3) for tensor in learnt]
            back = self._timed(lambda: torch.autograd.backward(learnt, gradients)) if learnt else 0.0
        for tensor in self._tensors.values():
            tensor.grad = None
        return there, back

    def emit(self, samples: int) -> float:
        """Seconds of a forward in eval mode, after one that warms up."""
        self._layer.module.eval()
        inputs = self._inputs(samples)
        with torch.no_grad():
            return min(self._timed(lambda: self._layer.run_on(self._tensors, *inputs)) for _ in range(2))

    def _timed(self, work: Callable[[], object]) -> float:
        return timed(self._device, work)

    def _inputs(self, samples: int) -> list[Tensor]:
        return [self._filled(self._device.empty((samples, *spec.shape), spec.dtype)) for spec in self._before]

    def _like(self, tensor: Tensor) -> Tensor:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device.torch_device)
        return self._filled(made).requires_grad_(tensor.requires_grad)

    def _filled(self, tensor: Tensor) -> Tensor:
        """Small positive values, which a variance may have too; whole numbers are 0, which is a token everywhere."""
        return tensor.uniform_(0.01, 0.1, generator=self._random) if tensor.is_floating_point() else tensor.zero_()


def machine(device: Device, optimizer: OptimizerSpec, folder: Path, room: int) -> tuple[float, float, float, float]:
    """MachineTimings that do not depend on the model.

    Args:
        device: open.
        optimizer: whose step is timed.
        folder: on the drive where runs are; what is written there is deleted.
        room: bytes that may be in use on the device.

    Returns:
        Seconds of the optimizer's step per parameter; per byte read from the drive, and written; per byte through memory.
    """
    read, write = _drive(folder, max(1, min(_MOVED, room // 4)))
    if not device.shares_host:
        # What is on the drive goes through the host.
        up, down = _copies(device, room)
        read, write = read + up, write + down
    return _step(device, optimizer, room), read, write, _touch(device, room)


def _step(device: Device, optimizer: OptimizerSpec, room: int) -> float:
    """Seconds of the optimizer's step, per parameter."""
    count = max(1, min(_STEPPED, room // (2 * _FLOAT_BYTES * (2 + len(optimizer.state_names)))))
    parameter = nn.Parameter(torch.zeros(count, device=device.torch_device))
    parameter.grad = torch.full_like(parameter, 1e-3)
    layout = optimizer.layout(parameter).items()
    state = {name: torch.zeros(shape, dtype=dtype, device=device.torch_device) for name, (dtype, shape) in layout}
    stepper = optimizer.build({"p": parameter}, {"p": state})
    return min(timed(device, stepper.step) for _ in range(_REPEATS)) / count


def _touch(device: Device, room: int) -> float:
    """Seconds per byte that is read or written in the device's memory."""
    source = torch.zeros(max(1, min(_TOUCHED, room // 4) // _FLOAT_BYTES), device=device.torch_device)
    target = torch.zeros_like(source)
    return min(timed(device, lambda: target.copy_(source)) for _ in range(_REPEATS)) / (2 * source.nbytes)


def _copies(device: Device, room: int) -> tuple[float, float]:
    """Seconds per byte to the device, and back."""
    host = torch.zeros(max(1, min(_MOVED, room // 4) // _FLOAT_BYTES))
    there = device.to_device(host)
    up = min(timed(device, lambda: device.to_device(host)) for _ in range(_REPEATS))
    down = min(timed(device, lambda: device.to_host(there)) for _ in range(_REPEATS))
    return up / host.nbytes, down / host.nbytes


def clock_of(device: Device) -> Callable[[], float]:
    """This thread's own time where it computes alone, so that others on a busy machine do not count; else the wall's."""
    return time.thread_time if device.shares_host and torch.get_num_threads() == 1 else time.perf_counter


def timed(device: Device, work: Callable[[], object]) -> float:
    """Seconds of some work on a device, by its clock."""
    clock = clock_of(device)
    device.synchronize()
    began = clock()
    work()
    device.synchronize()
    return clock() - began


def _drive(folder: Path, nbytes: int) -> tuple[float, float]:
    """Seconds per byte, read and written as weight files are: in place, not synced."""
    tensor = aligned_empty((nbytes,), torch.uint8).fill_(1)
    for parent in (folder, None):
        with suppress(OSError, DiskError), tempfile.TemporaryDirectory(prefix=".lowmem-pnn-", dir=parent) as name:
            with TensorFile.create(Path(name) / "rate", {"x": (torch.uint8, (nbytes,))}) as file:
                writes = [_seconds(lambda: file.write_from("x", tensor)) for _ in range(_REPEATS)]
                reads = [_seconds(lambda: file.read_into("x", tensor)) for _ in range(_REPEATS)]
            return min(reads) / nbytes, min(writes) / nbytes
    return 0.0, 0.0  # nothing can be written anywhere: a run will say so


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _line(few: int, low: float, many: int, high: float) -> Seconds:
    """The straight line through two measurements; through zero where time grows faster than the samples, as beyond a cache."""
    slope = (high - low) / (many - few) if many > few else high / many
    fixed = high - slope * many
    return Seconds(fixed, slope) if fixed >= 0 and slope >= 0 else Seconds(0.0, high / many)


def _scaled(line: Seconds, factor: float) -> Seconds:
    return Seconds(line.fixed * factor, line.per_sample * factor)


def _estimate(number: int, profile: MemoryProfile, known: dict[int, LayerSeconds]) -> LayerSeconds:
    """A layer that there was no time for: as the one most like it in multiply-accumulates per byte of its outputs, scaled."""
    nothing = Seconds(0.0, 0.0)
    if not known:
        return LayerSeconds(nothing, nothing, nothing, nothing)

    def density(at: int) -> float:
        cost = profile.layers[at]
        return math.log(max(1, cost.forward_macs) / max(1, cost.output_bytes.per_sample))

    def size(at: int) -> float:
        cost = profile.layers[at]
        return max(cost.forward_macs, cost.output_bytes.per_sample, 1)

    like = min(known, key=lambda at: (abs(density(at) - density(number)), at))
    factor, found = size(number) / size(like), known[like]
    lines = (found.forward, found.backward, found.backward_first, found.emit)
    return LayerSeconds(*(_scaled(line, factor) for line in lines))


@contextmanager
def _nothing_changed(chain: Chain) -> Iterator[None]:
    """Put the modes of all modules, and the random generators, back at the end."""
    modes = {module: module.training for layer in chain.layers for module in layer.module.modules()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
