"""The sweeper: takes one batch forward through all partitions and back, one partition on the device at a time.

    forward   p0 -> p1 -> ... -> pK-2          activations of all micro-batches are kept at each boundary
    backward  pK-1 -> ... -> p1 -> p0          each partition runs forward once more, with the random state it had, and then back

Every weight and every piece of optimizer state of a batch is read in an order that is known beforehand: the weights reads ahead while
a partition computes, across the partitions' ends. What was stepped is written behind.

Buffers (BatchNorm's statistics) are what they were before the batch when a partition runs forward once more, since what the first
forward did to them was dropped with it; so each batch counts once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowmem_pnn.device import Device
from lowmem_pnn.engine.loaders import Batch
from lowmem_pnn.engine.micro_batches import micro_batches
from lowmem_pnn.engine.optimizer_in_backward import OptimizerInBackward
from lowmem_pnn.engine.passes import backward_from_loss, forward, to_device_aligned
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.engine.uploads import MicroBatch, Uploads
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.errors import DivergedError
from lowmem_pnn.methods import Objective, Sweep, Visit
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.model.precision import LossScale
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.keys import weight_key
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.sweep.boundary_buffers import BoundaryBuffers
from lowmem_pnn.sweep.optimizer_steps import Gradients, SweepOptimizerSteps
from lowmem_pnn.sweep.recompute import unneeded_products, without_products
from lowmem_pnn.sweep.weight_streamer import WeightStreamer
from lowmem_pnn.workload import Workload


@dataclass
class _Work:
    """A batch under way.

    Args:
        tensors: of the first boundary, each (B, ...), on the host.
        labels: (B, ...).
        parts: its micro-batches.
        gradients: what is known of them.
        loss: so far.
    """

    tensors: tuple[Tensor, ...]
    labels: Tensor
    parts: Sequence[slice]
    gradients: Gradients
    loss: float = 0.0


class Sweeper:
    """Runs the visits of a sweep, batch by batch.

    Args:
        workload: model and method.
        plan: how it is cut.
        sweep: the visits of a batch.
        device: open.
        weights: of the run; working files are written in place.
        threads: for reading ahead and writing behind.
        counter: of the bytes that cross partitions on disk.
        folder: where a file for these may be.
        total_steps: optimizer steps of the whole sweep, for the learning rate.
        on_visit: called when a visit begins, with the partition's number.
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
        self._last = len(plan.partitions) - 1
        self._residencies = [
            Residency(workload.chain, part.start, part.stop, device, None, frozen=number not in sweep.learners)
            for number, part in enumerate(plan.partitions)
        ]
        self._unneeded = [unneeded_products(residency.layers[-1]) for residency in self._residencies]
        # Names in weight files, which do not change.
        self._tensor_keys = [residency.keys() for residency in self._residencies]
        self._steps = SweepOptimizerSteps(workload, plan, sweep, self._residencies, device, total_steps)
        self._active: int | None = None
        buffer_sizes, seed = device.buffer_sizes, workload.config.seed
        window = plan.stream_bytes or buffer_sizes.stream_bytes
        self._weights = WeightStreamer(weights, device, threads, window, self._steps.largest_state(weights))
        phase = "forward" if sweep.phase == "epoch" else sweep.phase
        self._boundary = BoundaryBuffers(device, folder, buffer_sizes.boundary_bytes, counter, seed, phase)
        self._uploads = Uploads(device)
        self._objective: Objective = workload.objective(plan, self._last)
        self._objective.prepare(device.torch_device)

    def train_batch(self, batch: Batch, step: int, micro_batch: int, scale: LossScale) -> float:
        """All visits of one batch.

        Args:
            batch: tensors of the first boundary (B, ...) and labels (B, ...), on the host.
            step: optimizer steps of this sweep before it.
            micro_batch: samples on the device at once.
            scale: of the loss; moved on.

        Returns:
            The batch's mean loss.

        Raises:
            DivergedError: the loss, or a gradient, is not finite.
            CaptureError: a parameter got no gradient.
            Exception: memory ran out (`is_out_of_memory`). Some weights may have been stepped: only a commit can be gone back to.
        """
        parts = micro_batches(len(batch[1]), micro_batch, self._plan.smallest_micro_batch)
        work = _Work(*batch, parts, Gradients(step, scale))
        actions: dict[str, Callable[[Visit, _Work], None]] = {
            "emit": self._emit,
            "backpropagate": self._backpropagate,
            "step": self._step_kept,
        }
        with self._weights.batch(self._keys(step)):
            for visit in self._sweep.visits:
                self._on_visit(visit.partition)
                actions[visit.action](visit, work)
                self._device.check_budget()
        self._boundary.clear()
        scale.update(overflowed=work.gradients.overflowed)
        return work.loss

    def try_partition(self, number: int, samples: int, micro_batch: int) -> None:
        """Take zeros forward and back through one partition, and forget it.

        Args:
            number: the partition's.
            samples: how many zeros.
            micro_batch: of them on the device at once.

        Raises:
            Exception: memory ran out (`is_out_of_memory`), or the model does not run on real tensors.
        """
        planned, chain = self._plan.partitions[number], self._workload.chain
        before, after = chain.boundaries[planned.start], chain.boundaries[planned.stop]
        tensors = tuple(_zeros(slice(0, samples), spec) for spec in before) if number == 0 else ()
        labels = torch.zeros(samples, *self._workload.dataset.label_shape, dtype=torch.int64)
        parts = micro_batches(samples, micro_batch, self._plan.smallest_micro_batch)
        work = _Work(tensors, labels, parts, Gradients(0, LossScale()))
        for part_number, part in enumerate(work.parts):
            if number > 0:
                self._boundary.put_boundary(number, part_number, [_zeros(part, spec) for spec in before])
            if number < self._last:
                gradients = [_zeros(part, spec) if spec.dtype.is_floating_point else None for spec in after]
                self._boundary.put_gradients(number + 1, part_number, gradients)
        try:
            with self._weights.batch(self._tensor_keys[number]):
                visit = Visit("backpropagate", number, "train", learns=True, returns_input_gradient=number > 0)
                residency = self._enter(visit)
                with self._layer_steps(visit, work, partial(self._forget, residency)):
                    self._backward(residency, visit, work)
        finally:
            self.close()

    def settle(self) -> None:
        """Wait until all that was stepped is in the weight files: before a commit.

        Raises:
            DiskError: it could not be written.
        """
        self._weights.settle()

    def rest(self) -> None:
        """Free all memory, for something else to be done before the next batch."""
        self._leave()
        self._weights.rest()

    def close(self) -> None:
        """Give everything up: what waits to be written is written, or not."""
        for residency in self._residencies:
            for parameter in residency.parameters.values():
                parameter.grad = None
        self._uploads.drop()
        self._leave()
        self._weights.close()
        self._boundary.close()

    def title(self, number: int) -> str:
        """A partition in words."""
        return self._plan.title(number, [layer.name for layer in self._workload.chain.layers])

    # The visits.

    def _emit(self, visit: Visit, work: _Work) -> None:
        residency, own = self._enter(visit), visit.partition
        for number, part in enumerate(work.parts):
            began = self._boundary.begin_random(own, number, work.gradients.step)
            inputs = self._inputs(own, number, part, work)
            with torch.no_grad():
                outputs = forward(residency.layers, inputs)
            self._boundary.put_boundary(own + 1, number, outputs)
            del inputs, outputs
            self._boundary.end_random(own, number, began)
            self._device.check_budget()
        self._leave()

    def _backpropagate(self, visit: Visit, work: _Work) -> None:
        residency, own = self._enter(visit), visit.partition
        if not visit.learns:
            self._backward(residency, visit, work)
            self._check_loss(visit, work)
            return
        with self._weights.writing(own) as (file, is_new):
            step_fn = partial(self._keep, visit, work) if visit.keeps_gradients else partial(self._apply, visit, work, file)
            with self._layer_steps(visit, work, step_fn) as steps:
                self._backward(residency, visit, work)
            self._check_loss(visit, work)
            residency.check_gradients(self.title(own), steps.stepped)
            # Frozen weights go into a new file once; buffers change with every batch.
            for name, parameter in residency.parameters.items():
                if is_new and not parameter.requires_grad and name not in residency.owned_elsewhere:
                    self._weights.write(own, file, weight_key(name), parameter)
            for name, buffer in residency.buffers.items():
                if name in residency.owned_elsewhere:
                    continue
                # A copy: the next batch's forward changes it, if the partition stays, while this is being written.
                self._weights.write(own, file, weight_key(name), buffer.clone())
            steps.finish()

    def _step_kept(self, visit: Visit, work: _Work) -> None:
        """Apply kept gradients; the partition need not be resident."""
        self._leave()
        with self._weights.writing(visit.partition) as (file, _):
            self._steps.apply_kept(visit.partition, work.gradients, self._weights, self._boundary, file)

    def _check_loss(self, visit: Visit, work: _Work) -> None:
        if visit.partition == self._last and not math.isfinite(work.loss):
            raise DivergedError(
                f"the loss became {work.loss} in {self.title(visit.partition)}, step {work.gradients.step + 1}; the last commit is "
                f"kept; {work.gradients.scale.remedy}"
            )

    # What is done with a layer's gradients.

    def _layer_steps(self, visit: Visit, work: _Work, step_fn: Callable[[int], None]) -> OptimizerInBackward:
        residency = self._residencies[visit.partition]
        after_backward, at_once = (
            self._steps.after_backward[visit.partition],
            self._workload.config.step_in_backward and len(work.parts) == 1,
        )
        return OptimizerInBackward(residency.groups, residency.parameters, after_backward, step_fn, at_once=at_once)

    def _apply(self, visit: Visit, work: _Work, file: TensorFile, number: int) -> None:
        self._steps.apply(visit.partition, number, work.gradients, self._weights, file)

    def _keep(self, visit: Visit, work: _Work, number: int) -> None:
        self._steps.keep(visit.partition, number, work.gradients, self._boundary)

    def _forget(self, residency: Residency, number: int) -> None:
        for name in residency.groups[number]:
            residency.parameters[name].grad = None

    # Their parts.

    def _enter(self, visit: Visit) -> Residency:
        residency = self._residencies[visit.partition]
        if self._active != visit.partition:
            self._leave()
            self._active = visit.partition
            self._weights.expect(self._tensor_keys[visit.partition])
            residency.fill(self._weights.take)
        for layer in residency.layers:
            layer.module.train(visit.learns)
        return residency

    def _leave(self) -> None:
        if self._active is not None:
            self._residencies[self._active].unload()
            self._active = None

    def _inputs(self, partition: int, number: int, part: slice, work: _Work) -> tuple[Tensor, ...]:
        """A micro-batch at a partition's boundary, on the device; the next one may be on its way after it."""

        def piece(number: int, part: slice) -> MicroBatch:
            if partition == 0:
                return MicroBatch.of((work.tensors, work.labels), part)
            return MicroBatch((partition, number), lambda: self._boundary.boundary(partition, number))

        following = work.parts[number + 1 : number + 2]
        return self._uploads.take(piece(number, part), piece(number + 1, following[0]) if following else None)

    def _backward(self, residency: Residency, visit: Visit, work: _Work) -> None:
        """Forward once more and back, micro-batch by micro-batch."""
        own = visit.partition
        shared = {name: buffer.clone() for name, buffer in residency.buffers.items() if name in residency.shared}
        for number, part in enumerate(work.parts):
            self._boundary.begin_random(own, number, work.gradients.step)
            inputs = self._inputs(own, number, part, work)
            for tensor in inputs:
                tensor.requires_grad_(visit.returns_input_gradient and tensor.is_floating_point())
            hooks = self._boundary.add_shared(residency, number)
            if own == self._last:
                share = (part.stop - part.start) / len(work.labels)
                labels = to_device_aligned(self._device, work.labels[part])
                work.loss += backward_from_loss(
                    residency.layers, inputs, labels, self._objective, share, self._plan.loss_chunk, work.gradients.scale.value
                )
            else:
                self._backward_from_boundary(own, inputs, number)
            for hook in hooks:
                hook.remove()
            if visit.returns_input_gradient:
                self._boundary.put_gradients(own, number, [tensor.grad for tensor in inputs])
            del inputs
            self._boundary.put_shared(residency, number)
            self._boundary.drop_boundary(own, number)
            self._device.check_budget()
        residency.copy_back_replaced_buffers()
        residency.check_shared_buffers(shared)

    def _backward_from_boundary(self, own: int, inputs: tuple[Tensor, ...], number: int) -> None:
        """The outputs went on in the forward visit: only their gradients are of use now."""
        with without_products(self._unneeded[own]):
            outputs = forward(self._residencies[own].layers, inputs)
        pairs = zip(outputs, self._boundary.pop_gradients(own + 1, number), strict=True)
        learnt = [(output, gradient) for output, gradient in pairs if gradient is not None and output.requires_grad]
        del outputs, pairs
        if learnt:
            torch.autograd.backward([output for output, _ in learnt], [gradient for _, gradient in learnt])

    # What is read, in which order.

    def _keys(self, step: int) -> Iterator[str]:
        """All tensors that `train_batch` takes, in its order."""
        resident = self._active
        for visit in self._sweep.visits:
            number, is_step = visit.partition, visit.action == "step"
            if is_step:
                resident = None
            elif resident != number:
                yield from self._tensor_keys[number]
                resident = number
            if is_step or (visit.action == "backpropagate" and visit.learns and not visit.keeps_gradients):
                yield from self._steps.keys(number, step, with_weights=is_step)


def _zeros(part: slice, spec: TensorSpec) -> Tensor:
    return torch.zeros(part.stop - part.start, *spec.shape, dtype=spec.dtype)
