"""The forecast of a program: how many seconds it takes, and its traffic with the drive, as a sum over its visits. No torch.

    learn           batches * (micro-batches * (forward + backward + loss) + step), or reading samples where that takes longer;
                    then the validation samples forward
    meta            batches * three forwards of the meta model, by its multiply-accumulates; so do learn and emit count thin parts
    emit            samples forward; writing them where that takes longer
    a sweep's emit  loading the weights, micro-batches * forward
      backpropagate loading the weights, micro-batches * (forward + backward), then the step: state read, weights and state written;
                    products that the emit kept are read instead of computed, and were written there
      step          weights, gradients and state read, written

Prefetching hides the bytes that a stream holds, and no more: the first layers of a partition are needed at once. Samples are read while
the batch before is computed, so that the longer of these two counts. Reads and writes share one drive. Not counted: commits (syncing
the drive overlaps training), the start of a run, its test and its export.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lowmem_pnn.methods import SplitName, Sweep, Visit
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.profiling.peaks import largest_micro_batch
from lowmem_pnn.profiling.timings import MachineTimings

# How often a loss and its gradient go through memory, for each byte of a partition's outputs: targets, difference, square and gradient,
# each of them read and written. Counted, not measured.
_LOSS_PASSES = 8
_PARAMETER_BYTES = 4
# Share of a forward that its products take, where all of them are kept; measured on blocks of a transformer.
_SHARE_OF_PRODUCTS = 0.9


@dataclass(frozen=True)
class PartitionBytes:
    """Bytes of a partition in files.

    Args:
        weights: Bytes of the parameters and the buffers.
        buffers: Bytes of the buffers alone.
        trainable: Bytes of the trainable parameters.
        optimizer: Bytes of the optimizer state.
        inputs: Bytes of a sample in the store that training reads.
        outputs: Bytes of a sample's outputs as they are computed.
        stored_outputs: Bytes of a sample's outputs in the store that the next partition learns from.
        kept: Bytes of a sample's products that a sweep keeps for the second forward.
        resident_weights: Bytes of the trainable parameters that stay in memory from one visit of a sweep to the next.
        resident_state: Bytes of the optimizer state that does.
    """

    weights: int
    buffers: int
    trainable: int
    optimizer: int
    inputs: int
    outputs: int
    stored_outputs: int
    kept: int = 0
    resident_weights: int = 0
    resident_state: int = 0

    @property
    def moved_weights(self) -> int:
        """Bytes of the parameters and the buffers that a sweep reads when the partition is loaded."""
        return self.weights - self.resident_weights

    @property
    def moved_trainable(self) -> int:
        """Bytes of the trainable parameters that a sweep writes after their step."""
        return self.trainable - self.resident_weights

    @property
    def moved_state(self) -> int:
        """Bytes of the optimizer state that a sweep reads for a step, and writes after it."""
        return self.optimizer - self.resident_state


@dataclass(frozen=True)
class ForecastInputs:
    """Inputs of a forecast beside the program, the plan and the timings.

    Args:
        partitions: Bytes of each partition.
        samples: Number of samples in each split of the data.
        per_layer_loss: Whether each layer learns from its own loss, whose time is counted with the layer.
        stream_bytes: Bytes of weights and optimizer state that are prefetched, and as many that wait to be written.
        boundary_bytes: Bytes of a batch's boundary activations that a sweep keeps in memory.
        window_bytes: Bytes of samples that stay in memory from one epoch to the next.
        kept_shares: Share of a layer's multiply-accumulates whose products are kept, by the number of the layer.
    """

    partitions: Sequence[PartitionBytes]
    samples: Mapping[SplitName, int]
    per_layer_loss: bool = False
    stream_bytes: int = 0
    boundary_bytes: int = 0
    window_bytes: int = 0
    kept_shares: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TimeAndTraffic:
    """Seconds, and bytes read from and written to the drive.

    Example:
        >>> TimeAndTraffic(1.0, 2, 3) + TimeAndTraffic(1.0, 2, 3) * 2
        TimeAndTraffic(seconds=3.0, bytes_read=6, bytes_written=9)
    """

    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: "TimeAndTraffic") -> "TimeAndTraffic":
        return TimeAndTraffic(
            self.seconds + other.seconds, self.bytes_read + other.bytes_read, self.bytes_written + other.bytes_written
        )

    def __mul__(self, times: float) -> "TimeAndTraffic":
        return TimeAndTraffic(self.seconds * times, round(self.bytes_read * times), round(self.bytes_written * times))


def forecast_training(
    program: Sequence[Visit | Sweep], plan: Plan, inputs: ForecastInputs, timings: MachineTimings
) -> TimeAndTraffic:
    """Forecast a whole program.

    Args:
        program: Visits and sweeps of a method, recovery included.
        plan: Partitions and their micro-batches.
        inputs: Bytes and samples.
        timings: Timings of the machine.
    """
    forecast = _Forecast(plan, inputs, timings)
    total = TimeAndTraffic()
    for item in program:
        total += forecast.all_epochs(item)
    return total


def forecast_epoch(
    program: Sequence[Visit | Sweep], plan: Plan, inputs: ForecastInputs, timings: MachineTimings
) -> TimeAndTraffic:
    """Forecast one epoch of all partitions, the mean one; work that is done once for all epochs of a partition is spread over them.

    Args:
        program: Visits and sweeps of a method; recovery, which has epochs of its own, is left out.
        plan: Partitions and their micro-batches.
        inputs: Bytes and samples.
        timings: Timings of the machine.
    """
    forecast, samples = _Forecast(plan, inputs, timings), inputs.samples["train"]
    total = TimeAndTraffic()
    epochs = [0.0] * len(plan.partitions)
    for item in program:
        if isinstance(item, Visit) and item.action == "learn":
            begin, end = item.macro_batch or (0, samples)
            epochs[item.partition] += item.epochs * (end - begin) / samples
    # Epochs that differ, as where more is learnt from one of them on, weigh by their number.
    swept = sum(item.epochs for item in program if isinstance(item, Sweep) and item.phase == "epoch")
    for item in program:
        if isinstance(item, Visit):
            if item.action not in ("join", "meta"):
                total += forecast.all_epochs(item) * (1 / (epochs[item.partition] or max(epochs) or swept or 1))
        elif item.phase == "epoch":
            total += forecast.sweep_epoch(item) * (item.epochs / swept)
    return total


class _Forecast:
    """Rules of the module's docstring."""

    def __init__(self, plan: Plan, inputs: ForecastInputs, timings: MachineTimings) -> None:
        self._plan, self._inputs, self._timings = plan, inputs, timings
        self._last = len(plan.partitions) - 1

    def all_epochs(self, item: Visit | Sweep) -> TimeAndTraffic:
        """Forecast one visit or sweep of a program, with all of its epochs."""
        if isinstance(item, Sweep):
            return self.sweep_epoch(item) * item.epochs
        if item.action == "join":
            return TimeAndTraffic()
        if item.action == "meta":
            # A backward takes about as long as two forwards.
            return TimeAndTraffic(3 * item.epochs * self._inputs.samples["train"] * self._thin_seconds(sum(self._plan.thin_macs)))
        return self.learn(item) if item.action == "learn" else self.emit(item)

    def learn(self, visit: Visit) -> TimeAndTraffic:
        """Forecast a visit that learns: its partition is loaded, learns for its epochs, and is written."""
        part, size = self._plan.partitions[visit.partition], self._inputs.partitions[visit.partition]
        begin, end = visit.macro_batch or (0, self._inputs.samples["train"])
        samples = end - begin
        batches = [part.batch] * (samples // part.batch) + ([samples % part.batch] if samples % part.batch else [])
        computing = 0.0
        for batch in {*batches}:
            seconds = sum(self._pass(visit.partition, one, part.start) for one in self._micro_batches(batch, part.micro_batch))
            computing += batches.count(batch) * (seconds + self._step(visit.partition))
        if visit.thin:
            # Forward, and back without gradients of weights.
            computing += 2 * samples * self._thin_seconds(sum(self._plan.thin_macs[visit.partition + 1 :]))
        reading = TimeAndTraffic()
        if visit.partition > 0 and not visit.from_synthetic_labels:
            reading = self._read_samples(visit.partition, samples)
        epoch = TimeAndTraffic(max(computing, reading.seconds), reading.bytes_read)
        if "val" in self._inputs.samples and visit.macro_batch is None and not visit.from_synthetic_labels:
            epoch += self._forward(visit.partition, self._inputs.samples["val"])
        written = size.trainable + size.buffers + size.optimizer
        return epoch * visit.epochs + self._read(size.weights + size.optimizer) + self._write(written)

    def emit(self, visit: Visit) -> TimeAndTraffic:
        """Forecast a visit that writes the samples of the next boundary."""
        size = self._inputs.partitions[visit.partition]
        begin, end = visit.macro_batch or (0, self._inputs.samples[visit.split])
        forward, written = self._forward(visit.partition, end - begin), (end - begin) * size.stored_outputs
        if visit.thin:
            seconds = (end - begin) * self._thin_seconds(self._plan.thin_macs[visit.partition])
            forward = TimeAndTraffic(seconds, forward.bytes_read)
        # A thread writes behind, and copies what it writes.
        writing = written * (self._timings.write_per_byte + self._timings.memory_per_byte)
        return TimeAndTraffic(max(forward.seconds, writing), forward.bytes_read, written)

    def _thin_seconds(self, macs: int) -> float:
        """Return the seconds of a sample's forward through thin parts: as long for each multiply-accumulate as the model's own layers."""
        parts, layers = self._plan.partitions, self._timings.layers
        samples = min(part.micro_batch for part in parts)
        whole = sum(layer.emit.at(samples) for layer in layers) / samples
        return whole * macs / max(1, sum(part.forward_macs for part in parts))

    def sweep_epoch(self, sweep: Sweep) -> TimeAndTraffic:
        """Forecast an epoch of a sweep, and the validation at its end."""
        samples = self._inputs.samples["train"]
        full, rest = divmod(samples, sweep.batch_size)
        # The first partition stays on the device from one batch to the next.
        total = self._sweep_batch(sweep, sweep.batch_size) * full if full else TimeAndTraffic()
        if rest:
            total += self._sweep_batch(sweep, rest)
        if "val" in self._inputs.samples:
            number = self._inputs.samples["val"]
            for partition, size in enumerate(self._inputs.partitions):
                total += self._read(size.weights) + self._forward(partition, number)
                if partition < self._last:
                    total += self._write(number * size.outputs)
        return total

    def _sweep_batch(self, sweep: Sweep, batch: int) -> TimeAndTraffic:
        """Forecast a batch that goes through all partitions and back."""
        inputs, timings, total = self._inputs, self._timings, TimeAndTraffic()
        micro_batches = Counter(self._micro_batches(batch, self._plan.sweep_micro_batch))
        steps = [visit for visit in sweep.visits if visit.action == "step"]
        resident = None if steps else sweep.visits[-1].partition
        # Kept gradients take the place that activations leave in memory.
        kept = sum(inputs.partitions[visit.partition].trainable for visit in steps)
        share_on_disk = max(0, kept - inputs.boundary_bytes) / kept if kept else 0.0
        for visit in sweep.visits:
            number = visit.partition
            size, part = inputs.partitions[number], self._plan.partitions[number]
            if visit.action == "step":
                read = size.moved_trainable + round(size.trainable * share_on_disk) + size.moved_state
                total += self._streamed_step(number, read, size.moved_trainable + size.moved_state)
                resident = None
                continue
            if resident != number:
                moved = size.moved_weights
                total += TimeAndTraffic(max(0, moved - inputs.stream_bytes) * timings.read_per_byte, moved)
                resident = number
            layers = timings.layers[part.start : part.stop]
            if visit.action == "emit":
                forwards = (
                    [layer.forward for layer in layers] if visit.learns or visit.trains else [layer.emit for layer in layers]
                )
                total += TimeAndTraffic(sum(count * line.at(one) for one, count in micro_batches.items() for line in forwards))
                total += self._write(batch * size.kept)
                continue
            # Layers before the first that learns need no gradient: of the first partition no gradient of the inputs is computed.
            first = None if visit.returns_input_gradient else part.start
            passes = (count * self._pass(number, one, first, loss=number == self._last) for one, count in micro_batches.items())
            taken = sum(count * self._taken(number, one) for one, count in micro_batches.items())
            total += TimeAndTraffic(sum(passes) - taken) + self._read(batch * size.kept)
            if number == self._last and self._plan.vocabulary_tile and visit.learns:
                # The gradient goes to a file, whose slices the step reads; rows of embeddings are little beside it.
                total += self._write(size.trainable) + self._read(size.trainable)
            if visit.learns and visit.keeps_gradients:
                total += self._write(round(size.trainable * share_on_disk) + size.buffers)
            elif visit.learns:
                written = size.moved_trainable + size.buffers + size.moved_state
                total += self._streamed_step(number, size.moved_state, written)
        return total + self._spilled_boundaries(batch)

    def _spilled_boundaries(self, batch: int) -> TimeAndTraffic:
        """Forecast the traffic of a batch's boundary tensors that have no room in memory: activations, and then their gradients."""
        total, before = TimeAndTraffic(), 0
        for number, size in enumerate(self._inputs.partitions[:-1]):
            own = batch * size.outputs
            spilled = min(own, max(0, before + own - self._inputs.boundary_bytes))
            before += own
            # The last partition goes forward once.
            total += self._write(2 * spilled) + self._read((2 if number == self._last - 1 else 3) * spilled)
        return total

    def _streamed_step(self, number: int, read: int, written: int) -> TimeAndTraffic:
        """Forecast the optimizer's step, layer by layer: the time of the step, or of the bytes that the streams do not hide."""
        timings, stream = self._timings, self._inputs.stream_bytes
        moving = max(0, read - stream) * timings.read_per_byte + max(0, written - stream) * timings.write_per_byte
        return TimeAndTraffic(max(self._step(number), moving), read, written)

    def _pass(self, number: int, samples: int, first: int | None, *, loss: bool = True) -> float:
        """Return the seconds of a micro-batch forward through a partition, and back.

        Args:
            number: Number of the partition.
            samples: Samples in the micro-batch.
            first: Layer whose inputs have no gradient; None if there is none.
            loss: Whether the partition has a loss over its outputs; else its gradient comes from the next partition.
        """
        part, timings = self._plan.partitions[number], self._timings
        seconds = 0.0
        for layer in range(part.start, part.stop):
            no_input_gradient = layer == first or self._inputs.per_layer_loss
            own = timings.layers[layer]
            seconds += own.forward.at(samples) + (own.backward_to_weights if no_input_gradient else own.backward).at(samples)
        if loss and not self._inputs.per_layer_loss:
            seconds += _LOSS_PASSES * samples * self._inputs.partitions[number].outputs * timings.memory_per_byte
        return seconds

    def _taken(self, number: int, samples: int) -> float:
        """Return the seconds that a micro-batch's second forward saves, since it takes products instead of computing them."""
        part, shares = self._plan.partitions[number], self._inputs.kept_shares
        kept = [layer for layer in range(part.start, part.stop) if layer in shares]
        return sum(_SHARE_OF_PRODUCTS * shares[layer] * self._timings.layers[layer].forward.at(samples) for layer in kept)

    def _step(self, number: int) -> float:
        """Return the seconds of the optimizer's step of a partition."""
        return self._inputs.partitions[number].trainable / _PARAMETER_BYTES * self._timings.step_per_parameter

    def _forward(self, number: int, samples: int) -> TimeAndTraffic:
        """Forecast samples that go forward through a partition in eval mode, read from their store."""
        part = self._plan.partitions[number]
        size = min(part.batch, part.micro_batch)
        full, rest = divmod(samples, max(1, size))
        layers = self._timings.layers[part.start : part.stop]
        seconds = sum(full * layer.emit.at(size) + (layer.emit.at(rest) if rest else 0.0) for layer in layers)
        reading = self._read_samples(number, samples) if number else TimeAndTraffic()
        return TimeAndTraffic(max(seconds, reading.seconds), reading.bytes_read)

    def _read_samples(self, number: int, samples: int) -> TimeAndTraffic:
        """Forecast reading samples from their store and collating batches; samples that stay in memory are read once, uncounted."""
        nbytes = samples * self._inputs.partitions[number].inputs
        collating = 2 * nbytes * self._timings.memory_per_byte
        if nbytes <= self._inputs.window_bytes:
            return TimeAndTraffic(collating)
        return TimeAndTraffic(nbytes * self._timings.read_per_byte + collating, nbytes)

    def _micro_batches(self, batch: int, micro_batch: int) -> list[int]:
        """Return the numbers of samples in the micro-batches of a batch."""
        largest = largest_micro_batch(batch, micro_batch, self._plan.smallest_micro_batch)
        if largest == batch:
            return [batch]
        full, rest = divmod(batch, micro_batch)
        return [micro_batch] * (full - (largest > micro_batch)) + ([largest] if largest > micro_batch else [rest] if rest else [])

    def _read(self, nbytes: int) -> TimeAndTraffic:
        return TimeAndTraffic(nbytes * self._timings.read_per_byte, nbytes)

    def _write(self, nbytes: int) -> TimeAndTraffic:
        return TimeAndTraffic(nbytes * self._timings.write_per_byte, 0, nbytes)
