"""The sweeper: takes one batch forward through all partitions and back, one partition on the device at a time.

    forward   p0 -> p1 -> ... -> pK-2          activations of all micro-batches are kept at each boundary
    backward  pK-1 -> ... -> p1 -> p0          each partition runs forward once more, with the random state it had, and then back

Every weight and every piece of optimizer state of a batch is read in an order that is known beforehand: the supply reads ahead while
a partition computes, across the partitions' ends. What was stepped is written behind.

Buffers (BatchNorm's statistics) are what they were before the batch when a partition runs forward once more, since what the first
forward did to them was dropped with it; so each batch counts once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lowmem_pnn.chain import TensorSpec
from lowmem_pnn.crossing import Crossing
from lowmem_pnn.device import Device
from lowmem_pnn.early_stop import unneeded_products, without_products
from lowmem_pnn.errors import DivergedError
from lowmem_pnn.feeds import Batch
from lowmem_pnn.methods import Objective, Sweep, Visit
from lowmem_pnn.numerics import LossScale, unscale
from lowmem_pnn.passes import backward_from_loss, forward, micro_batches, place_aligned
from lowmem_pnn.plans import Plan
from lowmem_pnn.residency import Residency
from lowmem_pnn.stepping import state_keys, step, step_groups, take_state
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.naming import state_key, weight_key
from lowmem_pnn.stores.tensorfile import TensorFile
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.streams import Threads
from lowmem_pnn.supply import Supply
from lowmem_pnn.uploads import Piece, Uploads
from lowmem_pnn.workload import IoSizes, Workload


@dataclass
class _Work:
    """A batch under way.

    Args:
        tensors: of the first boundary, each (B, ...), on the host.
        labels: (B, ...).
        step: optimizer steps before it.
        scale: of the loss.
        parts: its micro-batches.
        loss: so far.
        norms: of gradients that are kept for a step, by parameter.
        total_norm: of all of them together, once the first is applied.
        overflowed: one of them is not finite, which a smaller scale may mend.
    """

    tensors: tuple[Tensor, ...]
    labels: Tensor
    step: int
    scale: LossScale
    parts: Sequence[slice]
    loss: float = 0.0
    norms: dict[str, Tensor] = field(default_factory=dict)
    total_norm: Tensor | None = None
    overflowed: bool = False


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
        threads: Threads,
        counter: IoCounter,
        folder: Path,
        total_steps: int,
        on_visit: Callable[[int], None] = lambda partition: None,
    ) -> None:
        self._workload = workload
        self._plan = plan
        self._sweep = sweep
        self._device = device
        self._total_steps = total_steps
        self._on_visit = on_visit
        self._last = len(plan.partitions) - 1
        self._residencies = [
            Residency(workload.chain, part.start, part.stop, device, None, frozen=number not in sweep.learners)
            for number, part in enumerate(plan.partitions)
        ]
        self._groups = [step_groups(residency) for residency in self._residencies]
        self._unneeded = [unneeded_products(residency.layers[-1]) for residency in self._residencies]
        # Names in weight files, which do not change: of a partition's tensors, and of the optimizer's state of each group.
        self._tensor_keys = [residency.keys() for residency in self._residencies]
        self._state_keys = [self._keys_of_state(number) for number in range(len(plan.partitions))]
        self._active: int | None = None
        io, seed = IoSizes.of_budget(device.budget_bytes), workload.config.seed
        self._supply = Supply(weights, device, threads, io.stream_bytes, self._largest_state(weights))
        place = "forward" if sweep.place == "epoch" else sweep.place
        self._crossing = Crossing(device, folder, io.boundary_bytes, counter, seed, place)
        self._uploads = Uploads(device)
        self._objective: Objective = workload.objective(plan, self._last)
        self._objective.prepare(device.torch_device)
        # Gradient norms are added up in the order in which the model names its parameters.
        self._order = {name: number for number, name in enumerate(workload.chain.persistent)}

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
        work = _Work(*batch, step, scale, micro_batches(len(batch[1]), micro_batch, self._plan.smallest_micro_batch))
        actions: dict[str, Callable[[Visit, _Work], None]] = {
            "emit": self._emit,
            "backpropagate": self._backpropagate,
            "step": self._step_kept,
        }
        with self._supply.batch(self._keys(step)):
            for visit in self._sweep.visits:
                self._on_visit(visit.partition)
                actions[visit.action](visit, work)
                self._device.check_budget()
        self._crossing.clear()
        scale.update(overflowed=work.overflowed)
        return work.loss

    def rehearse(self, number: int, samples: int, micro_batch: int) -> None:
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
        work = _Work(tensors, labels, 0, LossScale(), micro_batches(samples, micro_batch, self._plan.smallest_micro_batch))
        for part_number, part in enumerate(work.parts):
            if number > 0:
                self._crossing.put_boundary(number, part_number, [_zeros(part, spec) for spec in before])
            if number < self._last:
                gradients = [_zeros(part, spec) if spec.dtype.is_floating_point else None for spec in after]
                self._crossing.put_gradients(number + 1, part_number, gradients)
        try:
            with self._supply.batch(self._tensor_keys[number]):
                self._backward(Visit("backpropagate", number, "train", learns=True, hands_back=number > 0), work)
        finally:
            self.close()

    def settle(self) -> None:
        """Wait until all that was stepped is in the weight files: before a commit.

        Raises:
            DiskError: it could not be written.
        """
        self._supply.settle()

    def rest(self) -> None:
        """Free all memory, for something else to be done before the next batch."""
        self._leave()
        self._supply.rest()

    def close(self) -> None:
        """Give everything up: what waits to be written is written, or not."""
        for residency in self._residencies:
            for parameter in residency.parameters.values():
                parameter.grad = None
        self._uploads.drop()
        self._leave()
        self._supply.close()
        self._crossing.close()

    def title(self, number: int) -> str:
        """A partition in words."""
        return self._plan.title(number, [layer.name for layer in self._workload.chain.layers])

    # The visits.

    def _emit(self, visit: Visit, work: _Work) -> None:
        residency, own = self._enter(visit), visit.partition
        for number, part in enumerate(work.parts):
            began = self._crossing.begin_random(own, number, work.step)
            inputs = self._inputs(own, number, part, work)
            with torch.no_grad():
                outputs = forward(residency.layers, inputs)
            self._crossing.put_boundary(own + 1, number, outputs)
            del inputs, outputs
            self._crossing.end_random(own, number, began)
            self._device.check_budget()
        self._leave()

    def _backpropagate(self, visit: Visit, work: _Work) -> None:
        residency, own = self._backward(visit, work), visit.partition
        if own == self._last and not math.isfinite(work.loss):
            raise DivergedError(
                f"the loss became {work.loss} in {self.title(own)}, step {work.step + 1}; the last commit is kept; {work.scale.remedy}"
            )
        if not visit.learns:
            return
        residency.check_gradients(self.title(own))
        with self._supply.writing(own) as (file, is_new):
            # Frozen weights go into a new file once; buffers change with every batch.
            for name, parameter in residency.parameters.items():
                if is_new and not parameter.requires_grad and name not in residency.borrowed:
                    self._supply.write(own, file, weight_key(name), parameter)
            for name, buffer in residency.buffers.items():
                if name in residency.borrowed:
                    continue
                # A copy: the next batch's forward changes it, if the partition stays, while this is being written.
                self._supply.write(own, file, weight_key(name), buffer.clone())
            for names in self._groups[own]:
                parameters = {name: residency.parameters[name] for name in names}
                if visit.keeps_gradients:
                    self._keep(own, parameters, work)
                else:
                    self._step(own, parameters, work, file)

    def _step_kept(self, visit: Visit, work: _Work) -> None:
        """Apply kept gradients; the partition need not be resident."""
        self._leave()
        limit = self._workload.config.clip_norm
        if work.total_norm is None:
            # The norm of the norms, as `clip_grad_norm_` has it.
            norms = [norm for _, norm in sorted(work.norms.items(), key=lambda item: self._order[item[0]])]
            work.total_norm = nn.utils.get_total_norm(norms)
        with self._supply.writing(visit.partition) as (file, _):
            for names in self._groups[visit.partition]:
                parameters = {}
                for name in names:
                    parameters[name] = nn.Parameter(self._device.place(self._supply.take()))
                    parameters[name].grad = self._crossing.pop_whole(name)
                if limit is not None:
                    nn.utils.clip_grads_with_norm_(parameters.values(), limit, work.total_norm)
                self._step(visit.partition, parameters, work, file)

    # Their parts.

    def _enter(self, visit: Visit) -> Residency:
        residency = self._residencies[visit.partition]
        if self._active != visit.partition:
            self._leave()
            self._active = visit.partition
            self._supply.expect(self._tensor_keys[visit.partition])
            residency.fill(self._supply.take)
        for layer in residency.layers:
            layer.module.train(visit.learns)
        return residency

    def _leave(self) -> None:
        if self._active is not None:
            self._residencies[self._active].unload()
            self._active = None

    def _inputs(self, partition: int, number: int, part: slice, work: _Work) -> tuple[Tensor, ...]:
        """A micro-batch at a partition's boundary, on the device; the next one may be on its way after it."""

        def piece(number: int, part: slice) -> Piece:
            if partition == 0:
                return Piece.of((work.tensors, work.labels), part)
            return Piece((partition, number), lambda: self._crossing.boundary(partition, number))

        following = work.parts[number + 1 : number + 2]
        return self._uploads.take(piece(number, part), piece(number + 1, following[0]) if following else None)

    def _backward(self, visit: Visit, work: _Work) -> Residency:
        """Forward once more and back, micro-batch by micro-batch."""
        residency, own = self._enter(visit), visit.partition
        shared = {name: buffer.clone() for name, buffer in residency.buffers.items() if name in residency.shared}
        for number, part in enumerate(work.parts):
            self._crossing.begin_random(own, number, work.step)
            inputs = self._inputs(own, number, part, work)
            for tensor in inputs:
                tensor.requires_grad_(visit.hands_back and tensor.is_floating_point())
            hooks = self._crossing.add_shared(residency, number)
            if own == self._last:
                share = (part.stop - part.start) / len(work.labels)
                labels = place_aligned(self._device, work.labels[part])
                work.loss += backward_from_loss(
                    residency.layers, inputs, labels, self._objective, share, self._plan.loss_chunk, work.scale.value
                )
            else:
                self._backward_from_boundary(own, inputs, number)
            for hook in hooks:
                hook.remove()
            if visit.hands_back:
                self._crossing.put_gradients(own, number, [tensor.grad for tensor in inputs])
            del inputs
            self._crossing.put_shared(residency, number)
            self._crossing.drop_boundary(own, number)
            self._device.check_budget()
        residency.settle_buffers()
        residency.check_shared_buffers(shared)
        return residency

    def _backward_from_boundary(self, own: int, inputs: tuple[Tensor, ...], number: int) -> None:
        """The outputs went on in the forward visit: only their gradients are of use now."""
        with without_products(self._unneeded[own]):
            outputs = forward(self._residencies[own].layers, inputs)
        pairs = zip(outputs, self._crossing.pop_gradients(own + 1, number), strict=True)
        learnt = [(output, gradient) for output, gradient in pairs if gradient is not None and output.requires_grad]
        del outputs, pairs
        if learnt:
            torch.autograd.backward([output for output, _ in learnt], [gradient for _, gradient in learnt])

    def _keep(self, partition: int, parameters: dict[str, nn.Parameter], work: _Work) -> None:
        """Leave gradients for the steps that come when all of them are there."""
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            work.overflowed |= not unscale([parameter.grad], work.scale)
            work.norms[name] = torch.linalg.vector_norm(parameter.grad)
            if not work.scale.moves:
                self._check_finite(name, work.norms[name], partition, work)
            self._crossing.put_whole(name, parameter.grad)
            parameter.grad = None

    def _step(self, partition: int, parameters: dict[str, nn.Parameter], work: _Work, file: TensorFile) -> None:
        """Step a layer's parameters, and have them written."""
        spec = self._workload.optimizer(partition)
        state = take_state(spec, parameters, self._device, None if self._forgets_state(work.step) else self._supply.take)
        # A step that is left out is written all the same: the file may be a new one, without any values.
        if not work.overflowed:
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                self._check_finite(name, parameter.grad.sum(), partition, work)
            step(spec, parameters, state, self._workload.learning_rate(partition, work.step, self._total_steps))
        for name, parameter in parameters.items():
            self._supply.write(partition, file, weight_key(name), parameter)
            for key, tensor in state[name].items():
                self._supply.write(partition, file, state_key(name, key), tensor)

    def _check_finite(self, name: str, value: Tensor, partition: int, work: _Work) -> None:
        """Refuse a gradient by its sum or norm, before it gets into the weights."""
        if not math.isfinite(float(value)):
            raise DivergedError(
                f"the gradient of {name!r} is no longer finite in {self.title(partition)}, step {work.step + 1}; "
                "the last commit is kept; try a lower --lr"
            )

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
                for names, keys in zip(self._groups[number], self._state_keys[number], strict=True):
                    if is_step:
                        yield from map(weight_key, names)
                    if not self._forgets_state(step):
                        yield from keys

    def _keys_of_state(self, partition: int) -> list[list[str]]:
        meta, spec = self._residencies[partition].shapes(), self._workload.optimizer(partition)
        return [state_keys(spec, {name: meta[name] for name in names}) for names in self._groups[partition]]

    def _largest_state(self, weights: WeightStore) -> int:
        """Bytes of the largest optimizer state of a layer."""
        states = (keys for number in self._sweep.learners for keys in self._state_keys[number])
        return max((sum(map(weights.nbytes, keys)) for keys in states), default=0)

    def _forgets_state(self, step: int) -> bool:
        return self._sweep.fresh_state and step == 0


def _zeros(part: slice, spec: TensorSpec) -> Tensor:
    return torch.zeros(part.stop - part.start, *spec.shape, dtype=spec.dtype)
