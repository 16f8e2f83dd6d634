"""LayerBenchmark: measured timings of a model's layers on this machine.

Each layer runs alone on tensors of random values, forward and backward, at few samples and at as many as time, memory and the plans
allow. Layers with equal fingerprints are timed once, the most expensive ones first; one that by its multiply-accumulates would take more
than its share of the time runs once with as few samples as it accepts, or not at all. Between and beyond the two numbers of samples
time is taken to grow in a straight line. The chain's own tensors are neither read nor changed.
"""

import math
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from lowmem_pnn.device import Device, is_out_of_memory
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.profiling import nominal
from lowmem_pnn.profiling.costs import Affine, LayerCost, MemoryProfile
from lowmem_pnn.profiling.fingerprint import layer_fingerprint
from lowmem_pnn.profiling.layer_runner import LayerRunner, clock_of
from lowmem_pnn.profiling.machine_benchmark import time_machine, time_product
from lowmem_pnn.profiling.peaks import peak_of
from lowmem_pnn.profiling.timings import LayerTimings, Seconds

SECONDS = 2.0
"""Seconds for the layers of a chain; the rest of the machine takes about half a second more."""

# The least share of a chain's multiply-accumulates that must have been timed for the other layers to be estimated from it.
_LEAST_SHARE = 0.01

# Most wall time, in multiples of the seconds for the layers: on a busy machine the thread's own clock may hardly advance.
_PATIENCE = 4.0
# Samples of the small run, which shows the fixed cost of a call; and of one between, which shows how many samples there is time for.
_FEW, _BETWEEN = 2, 8
# Runs at the large number of samples, in multiples of one forward and backward: one that warms up, two that count, and the shorter ones
# without the gradient of the inputs and in eval mode.
_RUNS = 5.0
# Forwards that the runs at the small number of samples take as long as: two runs, one for the weights alone, and two in eval mode; and one
# run and one in eval mode, where no more is affordable.
_FEW_FORWARDS, _SINGLE_FORWARDS = 10, 4
# Multiply-accumulates that are not worth asking how long they take.
_FEW_MACS = 1_000_000_000
# A layer that takes no longer than this is timed whatever its share.
_ALWAYS = 0.1
# Multiply-accumulates that take as long as going through one weight, forward and backward, whatever the number of samples.
_MACS_OF_A_WEIGHT = 40


@dataclass
class LayerBenchmark:
    """Benchmark of layers that times every kind of layer once, also across chains as long as these exist.

    Args:
        device: Device, open.
        seconds: Seconds that timing the layers of one chain may take.
    """

    device: Device
    seconds: float = SECONDS
    _timings: dict[Hashable, LayerTimings] = field(default_factory=dict)
    _machine: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._clock = clock_of(self.device)

    def time_layers(
        self, chain: Chain, profile: MemoryProfile, max_samples: int, *, per_layer_loss: bool = False
    ) -> tuple[tuple[LayerTimings, ...], float]:
        """Time each layer of a chain.

        Args:
            chain: Chain of the model.
            profile: Memory costs of the layers: a layer runs with as many samples as fit the budget by themselves.
            max_samples: Most samples at once in the plans that are to be forecast.
            per_layer_loss: Whether a layer's backward begins at the class scores of its head.

        Returns:
            The timings of the layers; and the share of the multiply-accumulates that was timed, the timings of the others being estimated
            from these, or, where the share is 0, from their counts.
        """
        kinds = [
            (layer_fingerprint(layer), chain.boundaries[number], number > 0 and not per_layer_loss, per_layer_loss)
            for number, layer in enumerate(chain.layers)
        ]
        macs = [max(1, cost.forward_macs) for cost in profile.layers]
        first_of_kind = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
        efforts = [
            own * max_samples + _MACS_OF_A_WEIGHT * cost.num_params for own, cost in zip(macs, profile.layers, strict=True)
        ]
        # The expensive ones first: layers that there is no time for then matter least.
        untimed = sorted(
            (number for kind, number in first_of_kind.items() if kind not in self._timings), key=lambda number: -efforts[number]
        )
        remaining_effort = sum(efforts[number] for number in untimed)
        began, deadline = self._clock(), time.monotonic() + _PATIENCE * self.seconds
        with _model_unchanged(chain):
            for number in untimed:
                remaining = self.seconds - (self._clock() - began)
                if remaining <= 0 or time.monotonic() > deadline:
                    break
                share = remaining * efforts[number] / remaining_effort
                remaining_effort -= efforts[number]
                seconds = share, remaining
                timings = self._time_layer(chain, number, profile, max_samples, seconds, per_layer_loss=per_layer_loss)
                if timings is not None:
                    self._timings[kinds[number]] = timings
        timed = {number for number, kind in enumerate(kinds) if kind in self._timings}
        layers = tuple(
            self._timings[kind]
            if kind in self._timings
            else self._estimate(number, profile, {other: self._timings[kinds[other]] for other in timed})
            for number, kind in enumerate(kinds)
        )
        share = sum(macs[number] for number in timed) / sum(macs)
        return layers, share if share >= _LEAST_SHARE else 0.0

    def time_machine(self, optimizer: OptimizerSpec, folder: Path) -> tuple[float, float, float, float]:
        """Measure the timings of the machine as `machine_benchmark.time_machine` does: once per optimizer, in half of the budget."""
        if optimizer.name not in self._machine:
            self.device.enforce()
            room = (self.device.budget_bytes - self.device.reserve_bytes) // 2
            self._machine[optimizer.name] = time_machine(self.device, optimizer, folder, room)
        return self._machine[optimizer.name]

    @cached_property
    def _seconds_per_mac(self) -> float:
        self.device.enforce()
        return time_product(self.device, self.device.budget_bytes - self.device.reserve_bytes - max(0, self.device.used_bytes()))

    def _expected_seconds(self, cost: LayerCost, forwards: int, samples: int) -> float:
        """Return the least seconds of so many forwards of so many samples."""
        macs, speed = cost.forward_macs * samples, nominal.speed_of(shares_host=self.device.shares_host)
        # Few of them are not worth asking how long they take.
        computing = macs * self._seconds_per_mac if forwards * macs > _FEW_MACS else 0.0
        return forwards * (computing + cost.num_params * speed.forward_weight)

    def _estimate(self, number: int, profile: MemoryProfile, timed: dict[int, LayerTimings]) -> LayerTimings:
        """Estimate a layer that there was no time for, from those that were timed, or else from its counts and a matrix product."""
        # Layers that hardly multiply say nothing of those that do.
        macs = [cost.forward_macs for cost in profile.layers]
        if timed and sum(macs[other] for other in timed) >= _LEAST_SHARE * sum(macs):
            return _estimate(number, profile, timed)
        speed = nominal.speed_of(shares_host=self.device.shares_host)
        return nominal.layer_timings(profile.layers[number], replace(speed, mac=self._seconds_per_mac))

    def _time_layer(
        self,
        chain: Chain,
        number: int,
        profile: MemoryProfile,
        max_samples: int,
        share_and_rest: tuple[float, float],
        *,
        per_layer_loss: bool,
    ) -> LayerTimings | None:
        """Time a layer in its share of the seconds, or by a single run in all that are left; None where it does not run so here."""
        seconds, rest = share_and_rest
        self.device.enforce(profile.untouched_bytes)
        cost, smallest = profile.layers[number], profile.smallest_micro_batch
        room = self.device.budget_bytes - self.device.reserve_bytes - max(0, self.device.used_bytes())

        def fits(samples: int) -> bool:
            return peak_of([cost], samples, samples, Affine(0, cost.output_bytes.per_sample)) <= room

        # Nothing goes back through frozen layers before the first that learns.
        learns_before = any(one.requires_grad for layer in chain.layers[:number] for one in layer.parameters().values())
        began, few = self._clock(), max(smallest, min(_FEW, max_samples))
        affordable = max(seconds, _ALWAYS)
        is_single = self._expected_seconds(cost, _FEW_FORWARDS, few) > affordable
        if is_single:
            few = smallest
        if not fits(few) or (is_single and self._expected_seconds(cost, _SINGLE_FORWARDS, few) > rest):
            return None
        runner = LayerRunner(
            chain.layers[number],
            chain.boundaries[number],
            self.device,
            learns_input=learns_before and not per_layer_loss,
            per_layer_loss=per_layer_loss,
        )
        try:
            if is_single:
                return _of_single_run(runner, few, cost)
            of_few = runner.best(few, 1)
            many, of_many = few, of_few
            between = min(_BETWEEN, max_samples)
            if between > few and fits(between) and sum(of_few) * between / few <= affordable:
                many, of_many = between, runner.best(between, 1)
                remaining = seconds - (self._clock() - began)
                line = _line(few, sum(of_few), between, sum(of_many))
                while (
                    many < max_samples
                    and _RUNS * line.at(min(2 * many, max_samples)) <= remaining
                    and fits(min(2 * many, max_samples))
                ):
                    many = min(2 * many, max_samples)
                if many > between:
                    of_many = runner.best(many, 2)
            to_weights = runner.run(many, learns_input=False)[1] if runner.learns_input else of_many[1]
            emit = runner.emit(many)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
        forward, backward = (_line(few, low, many, high) for low, high in zip(of_few, of_many, strict=True))
        share = to_weights / of_many[1] if of_many[1] else 0.0
        return LayerTimings(forward, backward, _scaled(backward, share), _scaled(forward, emit / of_many[0]))


def _of_single_run(runner: LayerRunner, samples: int, cost: LayerCost) -> LayerTimings:
    """Time a layer by one run of so many samples, and one in eval mode; what the weights take of the backward is computed from counts."""
    emit = runner.emit(samples, times=1)  # which warms up
    of_few = runner.run(samples, learns_input=runner.learns_input)
    forward, backward = (_line(samples, own, samples, own) for own in of_few)
    counted = nominal.layer_timings(cost, nominal.CPU)
    share = counted.backward_to_weights.at(samples) / counted.backward.at(samples) if runner.learns_input else 1.0
    return LayerTimings(forward, backward, _scaled(backward, share), _scaled(forward, emit / of_few[0]))


def _line(few: int, low: float, many: int, high: float) -> Seconds:
    """Return the line through two measurements; through zero where time grows faster than the samples, as beyond a cache."""
    slope = (high - low) / (many - few) if many > few else high / many
    fixed = high - slope * many
    return Seconds(fixed, slope) if fixed >= 0 and slope >= 0 else Seconds(0.0, high / many)


def _scaled(line: Seconds, factor: float) -> Seconds:
    return Seconds(line.fixed * factor, line.per_sample * factor)


def _estimate(number: int, profile: MemoryProfile, timed: dict[int, LayerTimings]) -> LayerTimings:
    """Estimate a layer that there was no time for: scaled from the layer nearest in multiply-accumulates per byte of its outputs."""

    def density(layer: int) -> float:
        cost = profile.layers[layer]
        return math.log(max(1, cost.forward_macs) / max(1, cost.output_bytes.per_sample))

    def size(layer: int) -> float:
        cost = profile.layers[layer]
        return max(cost.forward_macs, cost.output_bytes.per_sample, 1)

    nearest = min(timed, key=lambda layer: (abs(density(layer) - density(number)), layer))
    factor, timings = size(number) / size(nearest), timed[nearest]
    lines = (timings.forward, timings.backward, timings.backward_to_weights, timings.emit)
    return LayerTimings(*(_scaled(line, factor) for line in lines))


@contextmanager
def _model_unchanged(chain: Chain) -> Iterator[None]:
    """Restore the modes of all modules, and the random generators, at the end."""
    modes = {module: module.training for layer in chain.layers for module in layer.module.modules()}
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), chain.python_state_restored():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
