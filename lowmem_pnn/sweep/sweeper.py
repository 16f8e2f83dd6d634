"""The sweeper: takes one batch forward through all partitions and back, one partition on the device at a time.

    forward   p0 -> p1 -> ... -> pK-2          activations of all micro-batches are kept at each boundary
    backward  pK-1 -> ... -> p1 -> p0          each partition runs forward once more, with the random state it had, and then back

The order in which a batch takes weights and optimizer state is known beforehand: they are prefetched while a partition computes, across
the ends of visits, and written behind after their step.

When a partition runs forward once more its buffers (BatchNorm's statistics) are those from before the batch, since the first forward's
changes to them were dropped when it was unloaded; so each batch counts once.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem_pnn.device import Device
from lowmem_pnn.engine.micro_batches import micro_batches
from lowmem_pnn.engine.optimizer_in_backward import OptimizerInBackward
from lowmem_pnn.engine.prefetch import WriteBehind
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.errors import DivergedError
from lowmem_pnn.memory.available import available_bytes
from lowmem_pnn.methods import Sweep, Visit
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.model.precision import LossScale
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.profiling import nominal
from lowmem_pnn.stores.activations import Batch
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.keys import state_key, weight_key
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.sweep.boundary_buffers import BoundaryBuffers
from lowmem_pnn.sweep.host_tier import HostTier, tier_bytes_of
from lowmem_pnn.sweep.kept_products import KeptProducts
from lowmem_pnn.sweep.optimizer_steps import Gradients, SweepOptimizerSteps
from lowmem_pnn.sweep.packs import Piece, Write
from lowmem_pnn.sweep.passes import SweepPasses, SweptBatch
from lowmem_pnn.sweep.resident_tensors import ResidentTensors
from lowmem_pnn.sweep.weight_streamer import WeightStreamer
from lowmem_pnn.workload import Workload


class Sweeper:
    """Runs the visits of a sweep, batch by batch.

    Args:
        workload: model, data and method.
        plan: partitions of the model.
        sweep: visits of a batch.
        device: training device, open.
        weights: weight files of the run; their working files are changed in place.
        threads: threads that read and write.
        counter: counter of the bytes that boundary buffers write to disk and read.
        folder: folder in which boundary buffers may make a file.
        total_steps: optimizer steps of the whole sweep, which the learning rate's schedule stretches over.
        on_visit: called with the partition's number when a visit begins.
    """

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        sweep: Sweep,
        device: Device,
        weights: WeightStore,
        threads: WorkerThreads,
        counter: IoCounter,
        folder: Path,
        total_steps: int,
        on_visit: Callable[[int], None] = lambda partition: None,
    ) -> None:
        self._workload = workload
        self._plan = plan
        self._sweep = sweep
        self._device = device
        self._on_visit = on_visit
        self._first, self._last = sweep.first, len(plan.partitions) - 1
        self._residencies = [
            Residency(workload.chain, part.start, part.stop, device, None, frozen=number not in sweep.learners)
            for number, part in enumerate(plan.partitions)
        ]
        # Names in weight files, which do not change.
        self._tensor_keys = [residency.layer_keys() for residency in self._residencies]
        self._steps = SweepOptimizerSteps(workload, plan, self._residencies, device, total_steps)
        self._resident: int | None = None
        buffer_sizes, seed = device.buffer_sizes, workload.config.seed
        stream_bytes = plan.stream_bytes or buffer_sizes.stream_bytes
        # One queue: what waits to be written, of whatever kind, is bounded as a whole.
        write_behind = WriteBehind(threads.write, stream_bytes)
        resident, tier = self._resident_tensors(), self._host_tier(weights)
        self._streamer = WeightStreamer(weights, device, threads, stream_bytes, write_behind, resident, tier)
        phase = "forward" if sweep.phase == "epoch" else sweep.phase
        self._buffers = BoundaryBuffers(device, folder, buffer_sizes.boundary_bytes, counter, seed, phase)
        is_kept = nominal.keeping_rule(workload.config.recompute, shares_host=device.shares_host)
        self._products = KeptProducts(device, folder, counter, threads, write_behind, stream_bytes, plan.kept_layers, is_kept)
        self._passes = SweepPasses(
            workload, plan, self._residencies, device, self._buffers, self._products, sweep.learners, sweep.first
        )

    def _host_tier(self, weights: WeightStore) -> HostTier | None:
        """Make the host tier, where the device is not the host: for weights first, which a batch reads twice."""
        config = self._workload.config
        if self._device.shares_host or not config.host_tier:
            return None
        layouts = [item for number in range(len(self._plan.partitions)) for item in weights.layout(number).items()]
        layouts.sort(key=lambda item: not item[0].startswith(weight_key("")))
        return HostTier(layouts, tier_bytes_of(config.max_host_mem, available_bytes("cpu")))

    def train_batch(self, batch: Batch, step: int, micro_batch: int, scale: LossScale, *, is_first: bool) -> float:
        """Run all visits of one batch: one optimizer step.

        Args:
            batch: tensors of the boundary before the first partition that is visited (B, ...) and labels (B, ...), on the host.
            step: number of optimizer steps of this sweep before the batch.
            micro_batch: samples on the device at once.
            scale: factor on the loss; adjusted after the step.
            is_first: whether no batch before it has taken a step of this sweep; where nothing counts, none is taken.

        Returns:
            The batch's mean loss.

        Raises:
            DivergedError: the loss, or a gradient, is not finite.
            CaptureError: a parameter got no gradient.
            Exception: memory ran out (`is_out_of_memory`). Some weights may have been stepped: only a commit can be gone back to.
        """
        parts = micro_batches(len(batch[1]), micro_batch, self._plan.smallest_micro_batch)
        fresh_state = self._sweep.fresh_state and is_first
        swept = SweptBatch(*batch, parts, Gradients(step, scale, fresh_state))
        actions: dict[str, Callable[[Visit, SweptBatch], None]] = {
            "emit": self._emit,
            "backpropagate": self._backpropagate,
            "step": self._step_kept,
        }
        with self._streamer.batch(self._pieces(fresh_state)):
            for visit in self._sweep.visits:
                self._on_visit(visit.partition)
                actions[visit.action](visit, swept)
                self._device.check_budget()
            if self._resident is not None and self._resident != self._last and self._written_names(self._resident):
                # The next batch's first forward would write into what is being saved, and what the second one begins with.
                self._unload()
        self._steps.read_gradients(swept.gradients)
        self._buffers.clear()
        self._products.clear()
        scale.update(overflowed=swept.gradients.overflowed)
        return swept.loss

    def try_partition(self, number: int, samples: tuple[tuple[Tensor, ...], Tensor], micro_batch: int) -> None:
        """Take samples forward and zeros back through one partition, and forget all of it.

        Args:
            number: number of the partition.
            samples: tensors of the boundary before it, each (B, ...), and targets (B, ...), on the host.
            micro_batch: samples on the device at once.

        Raises:
            Exception: memory ran out (`is_out_of_memory`), or the model does not run on real tensors.
        """
        planned, chain = self._plan.partitions[number], self._workload.chain
        after, (tensors, labels) = chain.boundaries[planned.stop], samples
        parts = micro_batches(len(labels), micro_batch, self._plan.smallest_micro_batch)
        batch = SweptBatch(tensors if number == self._first else (), labels, parts, Gradients(0, LossScale()))
        for part_number, part in enumerate(parts):
            if number > self._first:
                self._buffers.put_activations(number, part_number, [tensor[part] for tensor in tensors])
            if number < self._last:
                gradients = [_zeros(part, spec) if spec.takes_gradient else None for spec in after]
                self._buffers.put_gradients(number + 1, part_number, gradients)
        try:
            with self._streamer.batch(self._weight_pieces(number)):
                # The last of its visits: forward alone, where nothing before it and in it learns.
                visit = next(one for one in reversed(self._sweep.visits) if one.partition == number and one.action != "step")
                residency = self._load(visit)
                if visit.action == "emit":
                    self._passes.forward(number, batch)
                else:
                    with self._layer_steps(visit, batch, partial(_drop_gradients, residency)):
                        self._passes.backward(visit, batch)
        finally:
            self.close()

    def finish_writes(self) -> None:
        """Wait until all stepped weights are in the weight files, before a commit.

        Raises:
            DiskError: a write failed.
        """
        self._streamer.finish_writes()

    def free_memory(self) -> None:
        """Free all memory, so that other work can be done before the next batch."""
        self._unload()
        self._streamer.free_memory()
        self._release()

    def close(self) -> None:
        """Wait for the writes under way, whatever comes of them, and free all memory."""
        for residency in self._residencies:
            for parameter in residency.parameters.values():
                parameter.grad = None
        self._passes.close()
        self._unload()
        self._streamer.close()
        self._buffers.close()
        self._products.close()
        self._release()

    def _release(self) -> None:
        """Give freed memory back, where what comes next may not be able to use it; another device's allocator gives it to whatever that is."""
        if self._device.shares_host:
            self._device.release()

    def title(self, number: int) -> str:
        """Return a partition's number and layers in words."""
        return self._plan.title(number, [layer.name for layer in self._workload.chain.layers])

    # The visits.

    def _emit(self, visit: Visit, batch: SweptBatch) -> None:
        """Run a partition forward, and keep its outputs; what the forward changes in its buffers is dropped if it runs once more."""
        residency, number = self._load(visit), visit.partition
        if not visit.keeps_buffers:
            self._passes.forward(number, batch)
        else:
            with self._streamer.writing(number) as (file, is_new):
                self._passes.forward(number, batch)
                residency.copy_back_replaced_buffers()
                self._write_unstepped(number, file, is_new=is_new)
        self._unload()

    def _backpropagate(self, visit: Visit, batch: SweptBatch) -> None:
        """Run a partition backward; if it learns, step its layers or keep their gradients, and write its buffers."""
        residency, number = self._load(visit), visit.partition
        if not visit.learns:
            self._passes.backward(visit, batch)
            self._check_loss(visit, batch)
            return
        with self._streamer.writing(number) as (file, is_new):
            step_fn = (
                partial(self._keep_gradients, visit, batch)
                if visit.keeps_gradients
                else partial(self._step_group, visit, batch, file)
            )
            with self._layer_steps(visit, batch, step_fn) as steps:
                self._passes.backward(visit, batch)
            self._check_loss(visit, batch)
            residency.check_gradients(self.title(number), steps.stepped | self._buffers.stored.names)
            if visit.keeps_gradients:
                for name in self._written_names(number):
                    self._buffers.put_written(name, residency.parameters[name])
            self._write_unstepped(number, file, is_new=is_new)
            steps.finish()

    def _write_unstepped(self, number: int, file: TensorFile, *, is_new: bool) -> None:
        """Write what no step writes: buffers, which change with every batch, and frozen weights of the file's, which a new one gets once."""
        residency = self._residencies[number]
        frozen = [
            Write(weight_key(name), parameter)
            for name, parameter in residency.parameters.items()
            if is_new and not parameter.requires_grad and weight_key(name) in file.entries
        ]
        self._streamer.write_all(number, file, frozen)
        buffers = [
            Write(weight_key(name), buffer) for name, buffer in residency.buffers.items() if name not in residency.owned_elsewhere
        ]
        # Copies: the next batch's forward changes them, if the partition stays, while these are being written.
        self._streamer.write_all(number, file, buffers, copy=True)

    def _written_names(self, number: int) -> list[str]:
        """Return the parameters that a partition steps and its forward writes into: of an embedding with `max_norm`, say."""
        written = self._workload.chain.written
        return [name for group in self._residencies[number].groups for name in group if name in written]

    def _step_kept(self, visit: Visit, batch: SweptBatch) -> None:
        """Step a partition by kept gradients, without loading it as a whole."""
        self._unload()
        with self._streamer.writing(visit.partition) as (file, _):
            self._steps.step_kept(visit.partition, batch.gradients, self._streamer, self._buffers, file)

    def _check_loss(self, visit: Visit, batch: SweptBatch) -> None:
        self._passes.read_loss(batch)
        # Where the loss scale moves, gradients that are not finite have the step left out.
        if visit.partition == self._last and not math.isfinite(batch.loss) and not batch.gradients.scale.moves:
            raise DivergedError(
                f"the loss became {batch.loss} in {self.title(visit.partition)}, step {batch.gradients.step + 1}; the last commit is "
                f"kept; {batch.gradients.scale.remedy}"
            )

    # Steps of layers, in backward or after it.

    def _layer_steps(self, visit: Visit, batch: SweptBatch, step_fn: Callable[[int], None]) -> OptimizerInBackward:
        residency, after_backward = self._residencies[visit.partition], self._steps.after_backward[visit.partition]
        alone = len(batch.parts) == 1
        at_once = self._workload.config.step_in_backward and alone

        def step(group: int) -> None:
            if alone:
                self._buffers.add_in_step(residency, residency.groups[group])
            step_fn(group)

        return OptimizerInBackward(residency.groups, residency.parameters, after_backward, step, at_once=at_once)

    def _step_group(self, visit: Visit, batch: SweptBatch, file: TensorFile, group: int) -> None:
        self._steps.step_group(visit.partition, group, batch.gradients, self._streamer, self._buffers, file)
        self._streamer.keep_pool_to_limit()
        self._device.keep_to_expected_peak()

    def _keep_gradients(self, visit: Visit, batch: SweptBatch, group: int) -> None:
        self._steps.keep_gradients(visit.partition, group, batch.gradients, self._buffers)

    # The resident partition.

    def _load(self, visit: Visit) -> Residency:
        """Load a visit's partition, if it is not resident, and put its modules into the visit's mode."""
        residency = self._residencies[visit.partition]
        if self._resident != visit.partition:
            self._unload()
            self._resident = visit.partition
            self._streamer.reserve_pool_for(key for keys in self._tensor_keys[visit.partition] for key in keys)
            residency.fill(self._streamer.take)
        for layer in residency.layers:
            layer.train(visit.learns or visit.trains)
        return residency

    def _unload(self) -> None:
        """Unload the resident partition, if there is one."""
        if self._resident is not None:
            self._streamer.finish_writes_in_parts()
            # The allocator keeps the memory for the next partition, where it can: to ask the system for it again takes longer.
            self._residencies[self._resident].unload(release=False)
            self._resident = None
            self._device.release_for_next()

    def _resident_tensors(self) -> ResidentTensors:
        """Return the store of the weights and the optimizer state that stay in memory, of what is stepped in this sweep."""
        weights: list[str] = []
        state: list[str] = []
        for number in self._sweep.learners:
            residency, part, spec = self._residencies[number], self._plan.partitions[number], self._workload.optimizer(number)
            shapes, stepped = residency.shapes(), {name for names in residency.groups for name in names} - residency.shared
            for layer in range(part.start, part.stop):
                own = {residency.chain.owner_of(alias) for alias in residency.chain.layers[layer].parameters()} & stepped
                if layer in self._plan.resident_weights:
                    # Both forwards of a batch are to begin with the same weights.
                    weights += map(weight_key, own - residency.chain.written)
                if layer in self._plan.resident_state:
                    state += [state_key(name, one) for name in own for one in spec.layout(shapes[name])]
        return ResidentTensors(weights, state)

    def _weight_pieces(self, number: int) -> Iterator[Piece]:
        """Yield the weights and buffers of a partition, in the order in which they are taken."""
        for layer, keys in enumerate(self._tensor_keys[number]):
            for key in keys:
                yield Piece(key, None, ("weights", number, layer))

    def _pieces(self, fresh_state: bool) -> Iterator[Piece]:
        """Yield all that `train_batch` takes of the weight files, in its order."""
        resident = self._resident
        for visit in self._sweep.visits:
            number, is_step = visit.partition, visit.action == "step"
            if is_step:
                resident = None
            elif resident != number:
                yield from self._weight_pieces(number)
                resident = number
            if is_step or (visit.action == "backpropagate" and visit.learns and not visit.keeps_gradients):
                yield from self._steps.pieces(number, with_weights=is_step, fresh_state=fresh_state)


def _drop_gradients(residency: Residency, group: int) -> None:
    for name in residency.groups[group]:
        residency.parameters[name].grad = None


def _zeros(part: slice, spec: TensorSpec) -> Tensor:
    return torch.zeros(part.stop - part.start, *spec.shape, dtype=spec.dtype)
