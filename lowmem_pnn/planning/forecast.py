"""The forecast: how long a program takes, and what it moves to and from the drive, as a sum over its visits. No torch.

    learn           batches * (micro-batches * (forward + backward + loss) + step), or reading samples where that takes longer;
                    then the validation samples forward
    emit            samples forward; writing them where that takes longer
    a sweep's emit  loading the weights, micro-batches * forward
      backpropagate loading the weights, micro-batches * (forward + backward), then the step: state read, weights and state written
      step          weights, gradients and state read, written

Reading ahead hides what a stream holds, and no more: the first layers of a partition are wanted at once. Samples are read while the
batch before is computed, so of these two the longer counts. Reads and writes share one drive. Not counted: commits (the drive's syncs
run beside training), the start of a run, its test and its export.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowmem_pnn.methods import SplitName, Sweep, Visit
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.profiling.peaks import largest_micro_batch
from lowmem_pnn.profiling.timings import MachineTimings

# How often a loss and its gradient go through memory, for each byte of a partition's outputs: targets, difference, square and gradient,
# each of them read and written. Counted, not measured.
_LOSS_PASSES = 8


@dataclass(frozen=True)
class PartitionBytes:
    """What a partition has in files.

    Args:
        weights: its parameters and buffers, and `buffers` alone.
        buffers: of them.
        trainable: parameters that learn.
        optimizer: their optimizer's state.
        inputs: of a sample, where training reads it.
        outputs: of a sample, as it is computed.
        kept: of a sample, as it is written for the next partition to learn from.
    """

    weights: int
    buffers: int
    trainable: int
    optimizer: int
    inputs: int
    outputs: int
    kept: int


@dataclass(frozen=True)
class Setting:
    """What a forecast has to know of a run beside its program and its plan.

    Args:
        partitions: their bytes.
        samples: of each part of the data.
        per_layer_loss: layers learn from losses of their own, whose times are theirs.
        stream_bytes: that are read ahead, and as many that wait to be written.
        boundary_bytes: of a batch's activations that a sweep keeps in memory.
        window_bytes: of samples that stay in memory from one epoch to the next.
    """

    partitions: Sequence[PartitionBytes]
    samples: Mapping[SplitName, int]
    per_layer_loss: bool = False
    stream_bytes: int = 0
    boundary_bytes: int = 0
    window_bytes: int = 0


@dataclass(frozen=True)
class Work:
    """Seconds, and bytes from and to the drive.

    Example:
        >>> Work(1.0, 2, 3) + Work(1.0, 2, 3) * 2
        Work(seconds=3.0, read=6, written=9)
    """

    seconds: float = 0.0
    read: int = 0
    written: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.seconds + other.seconds, self.read + other.read, self.written + other.written)

    def __mul__(self, times: float) -> "Work":
        return Work(self.seconds * times, round(self.read * times), round(self.written * times))


def whole(program: Sequence[Visit | Sweep], plan: Plan, setting: Setting, rates: MachineTimings) -> Work:
    """What a whole program takes.

    Args:
        program: of a method, recovery included.
        plan: how the model is cut.
        setting: bytes and samples.
        rates: measured.
    """
    forecast = _Forecast(plan, setting, rates)
    total = Work()
    for item in program:
        total += _item(forecast, item)
    return total


def one_epoch(program: Sequence[Visit | Sweep], plan: Plan, setting: Setting, rates: MachineTimings) -> Work:
    """What an epoch of all partitions takes; what is done once for all epochs of a partition is spread over them.

    Args:
        program: of a method; recovery, which has epochs of its own, is left out.
        plan: how the model is cut.
        setting: bytes and samples.
        rates: measured.
    """
    forecast, samples = _Forecast(plan, setting, rates), setting.samples["train"]
    total = Work()
    epochs = [0.0] * len(plan.partitions)
    for item in program:
        if isinstance(item, Visit) and item.action == "learn":
            begin, end = item.macro_batch or (0, samples)
            epochs[item.partition] += item.epochs * (end - begin) / samples
    for item in program:
        if isinstance(item, Visit):
            if item.action != "join":
                total += _item(forecast, item) * (1 / max(epochs[item.partition], 1e-9))
        elif item.phase == "epoch":
            total += forecast.sweep_epoch(item)
    return total


def _item(forecast: "_Forecast", item: Visit | Sweep) -> Work:
    """One item of a program, all of its epochs."""
    if isinstance(item, Sweep):
        return forecast.sweep_epoch(item) * item.epochs
    if item.action == "join":
        return Work()
    return forecast.learn(item) if item.action == "learn" else forecast.emit(item)


class _Forecast:
    """The rules of the module's docstring."""

    def __init__(self, plan: Plan, setting: Setting, rates: MachineTimings) -> None:
        self._plan, self._setting, self._rates = plan, setting, rates
        self._last = len(plan.partitions) - 1

    def learn(self, visit: Visit) -> Work:
        """A visit that learns: its partition comes, learns for its epochs, and is written."""
        part, size = self._plan.partitions[visit.partition], self._setting.partitions[visit.partition]
        begin, end = visit.macro_batch or (0, self._setting.samples["train"])
        samples = end - begin
        batches = [part.batch] * (samples // part.batch) + ([samples % part.batch] if samples % part.batch else [])
        first = 0.0
        for batch in {*batches}:
            seconds = sum(self._pass(visit.partition, one, part.start) for one in self._parts(batch, part.micro_batch))
            first += batches.count(batch) * (seconds + self._step(visit.partition))
        reading = Work()
        if visit.partition > 0 and not visit.from_synthetic_labels:
            reading = self._stored(visit.partition, samples)
        epoch = Work(max(first, reading.seconds), reading.read)
        if "val" in self._setting.samples and visit.macro_batch is None and not visit.from_synthetic_labels:
            epoch += self._through(visit.partition, self._setting.samples["val"])
        moved = size.weights + size.optimizer
        return epoch * visit.epochs + self._read(moved) + self._write(moved)

    def emit(self, visit: Visit) -> Work:
        """A visit that writes the next boundary's samples."""
        size = self._setting.partitions[visit.partition]
        begin, end = visit.macro_batch or (0, self._setting.samples[visit.split])
        through, written = self._through(visit.partition, end - begin), (end - begin) * size.kept
        # A thread writes behind, and copies what it writes.
        behind = written * (self._rates.write_per_byte + self._rates.memory_per_byte)
        return Work(max(through.seconds, behind), through.read, written)

    def sweep_epoch(self, sweep: Sweep) -> Work:
        """An epoch of sweeps, and the validation at its end."""
        samples = self._setting.samples["train"]
        full, rest = divmod(samples, sweep.batch_size)
        # The first partition stays from one batch to the next.
        total = self._swept(sweep, sweep.batch_size) * full if full else Work()
        if rest:
            total += self._swept(sweep, rest)
        if "val" in self._setting.samples:
            number = self._setting.samples["val"]
            for partition, size in enumerate(self._setting.partitions):
                total += self._read(size.weights) + self._through(partition, number)
                if partition < self._last:
                    total += self._write(number * size.outputs)
        return total

    def _swept(self, sweep: Sweep, batch: int) -> Work:
        """A batch through all partitions and back."""
        setting, rates, total = self._setting, self._rates, Work()
        parts = Counter(self._parts(batch, self._plan.sweep_micro_batch))
        steps = [visit for visit in sweep.visits if visit.action == "step"]
        resident = None if steps else sweep.visits[-1].partition
        # Kept gradients come while activations go.
        kept = sum(setting.partitions[visit.partition].trainable for visit in steps)
        to_disk = max(0, kept - setting.boundary_bytes) / kept if kept else 0.0
        for visit in sweep.visits:
            number = visit.partition
            size, part = setting.partitions[number], self._plan.partitions[number]
            if visit.action == "step":
                read = size.trainable + round(size.trainable * to_disk) + size.optimizer
                total += self._stepped(number, read, size.trainable + size.optimizer)
                resident = None
                continue
            if resident != number:
                total += Work(max(0, size.weights - setting.stream_bytes) * rates.read_per_byte, size.weights)
                resident = number
            layers = rates.layers[part.start : part.stop]
            if visit.action == "emit":
                kind = [layer.forward for layer in layers] if visit.learns else [layer.emit for layer in layers]
                total += Work(sum(count * seconds.at(one) for one, count in parts.items() for seconds in kind))
                continue
            # Layers before the first that learns need no gradient, so that of a first partition nobody asks for its inputs'.
            first = None if visit.returns_input_gradient else part.start
            passes = (count * self._pass(number, one, first, loss=number == self._last) for one, count in parts.items())
            total += Work(sum(passes))
            if visit.learns and visit.keeps_gradients:
                total += self._write(round(size.trainable * to_disk) + size.buffers)
            elif visit.learns:
                total += self._stepped(number, size.optimizer, size.trainable + size.buffers + size.optimizer)
        return total + self._crossing(batch)

    def _crossing(self, batch: int) -> Work:
        """What crosses partitions and has no room in memory: activations that came when it was full, and then their gradients."""
        total, before = Work(), 0
        for number, size in enumerate(self._setting.partitions[:-1]):
            own = batch * size.outputs
            spilt = min(own, max(0, before + own - self._setting.boundary_bytes))
            before += own
            # The last partition goes forward once.
            total += self._write(2 * spilt) + self._read((2 if number == self._last - 1 else 3) * spilt)
        return total

    def _stepped(self, number: int, read: int, written: int) -> Work:
        """The optimizer's step, layer by layer: its own time, or that of what is read and written beyond what the streams hold."""
        rates, stream = self._rates, self._setting.stream_bytes
        moving = max(0, read - stream) * rates.read_per_byte + max(0, written - stream) * rates.write_per_byte
        return Work(max(self._step(number), moving), read, written)

    def _pass(self, number: int, samples: int, first: int | None, *, loss: bool = True) -> float:
        """A micro-batch forward through a partition, and back; seconds.

        Args:
            number: the partition's.
            samples: in the micro-batch.
            first: the layer whose inputs have no gradient.
            loss: of all of its outputs; else its gradient comes from the partition after it.
        """
        part, rates = self._plan.partitions[number], self._rates
        seconds = 0.0
        for layer in range(part.start, part.stop):
            apart = layer == first or self._setting.per_layer_loss
            own = rates.layers[layer]
            seconds += own.forward.at(samples) + (own.backward_to_weights if apart else own.backward).at(samples)
        if loss and not self._setting.per_layer_loss:
            seconds += _LOSS_PASSES * samples * self._setting.partitions[number].outputs * rates.memory_per_byte
        return seconds

    def _step(self, number: int) -> float:
        """The optimizer's step of a partition; seconds. Parameters have four bytes."""
        return self._setting.partitions[number].trainable / 4 * self._rates.step_per_parameter

    def _through(self, number: int, samples: int) -> Work:
        """Samples forward through a partition in eval mode, read where they are stored."""
        part = self._plan.partitions[number]
        size = min(part.batch, part.micro_batch)
        full, rest = divmod(samples, max(1, size))
        layers = self._rates.layers[part.start : part.stop]
        seconds = sum(full * layer.emit.at(size) + (layer.emit.at(rest) if rest else 0.0) for layer in layers)
        reading = self._stored(number, samples) if number else Work()
        return Work(max(seconds, reading.seconds), reading.read)

    def _stored(self, number: int, samples: int) -> Work:
        """Samples read from their store and put together as batches; what stays in memory is read once, and not counted."""
        nbytes = samples * self._setting.partitions[number].inputs
        together = 2 * nbytes * self._rates.memory_per_byte
        if nbytes <= self._setting.window_bytes:
            return Work(together)
        return Work(nbytes * self._rates.read_per_byte + together, nbytes)

    def _parts(self, batch: int, micro_batch: int) -> list[int]:
        """Samples of each micro-batch of a batch."""
        largest = largest_micro_batch(batch, micro_batch, self._plan.smallest_micro_batch)
        if largest == batch:
            return [batch]
        full, rest = divmod(batch, micro_batch)
        return [micro_batch] * (full - (largest > micro_batch)) + ([largest] if largest > micro_batch else [rest] if rest else [])

    def _read(self, nbytes: int) -> Work:
        return Work(nbytes * self._rates.read_per_byte, nbytes)

    def _write(self, nbytes: int) -> Work:
        return Work(nbytes * self._rates.write_per_byte, 0, nbytes)
