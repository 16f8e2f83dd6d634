"""The sweeper: takes one batch forward through all partitions and back, one partition on the device at a time.

    forward   p0 -> p1 -> ... -> pK-2          boundary activations of all micro-batches go to the scratch store
    backward  pK-1 -> ... -> p1 -> p0          each partition runs forward once more, with the random state it had, and then back

Every weight and every piece of optimizer state of a batch is read in an order that is known beforehand: the stream reads ahead while
a partition computes, across the partitions' ends. What was stepped is written behind.

Buffers (BatchNorm's statistics) are what they were before the batch when a partition runs forward once more, since what the first
forward did to them was dropped with it; so each batch counts once.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lowmem_pnn.device import Device
from lowmem_pnn.errors import CaptureError, DivergedError
from lowmem_pnn.executor import micro_batches
from lowmem_pnn.feeds import Batch
from lowmem_pnn.methods import Objective, Sweep, Visit
from lowmem_pnn.passes import backward_from_loss, forward, place_aligned
from lowmem_pnn.planner import Plan
from lowmem_pnn.residency import Residency
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.stepping import clip_factor, state_keys, step, step_groups, take_state
from lowmem_pnn.stores.blocks import BlockPool
from lowmem_pnn.stores.disk import IoCounter
from lowmem_pnn.stores.scratch import Scratch
from lowmem_pnn.stores.tensorfile import TensorFile
from lowmem_pnn.stores.weights import TensorReader, WeightStore, state_key, weight_key
from lowmem_pnn.streams import ReadAhead, Request, Threads, WriteBehind
from lowmem_pnn.workload import IoSizes, Workload


@dataclass
class _Batch:
    """A batch under way.

    Args:
        tensors: of the first boundary, each (B, ...), on the host.
        labels: (B, ...).
        step: optimizer steps before it.
        parts: its micro-batches.
        loss: so far.
        norms: of kept gradients, by parameter.
    """

    tensors: tuple[Tensor, ...]
    labels: Tensor
    step: int
    parts: tuple[slice, ...]
    loss: float = 0.0
    norms: dict[str, Tensor] = field(default_factory=dict)
    clip_factor: Tensor | None = None


class Sweeper:
    """Runs the visits of a sweep, batch by batch.

    Args:
        workload: model and method.
        plan: how it is cut.
        sweep: the visits of a batch.
        device: open.
        weights: of the run; working files are written in place.
        threads: for reading ahead and writing behind.
        counter: of the scratch store's bytes.
        folder: where the scratch store's file may be.
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
        self._weights = weights
        self._threads = threads
        self._total_steps = total_steps
        self._on_visit = on_visit
        self._io = IoSizes.of_budget(device.budget_bytes)
        self._scratch = Scratch(folder, self._io.boundary_bytes, counter)
        self._behind = WriteBehind(threads.write, self._io.stream_bytes)
        # Writes of the batch before, and of this one, by partition.
        self._written: dict[int, list[Future[None]]] = {}
        self._writing_now: dict[int, list[Future[None]]] = {}
        learners = sweep.learners
        self._residencies = [
            Residency(workload.chain, part.start, part.stop, device, None, frozen=number not in learners)
            for number, part in enumerate(plan.partitions)
        ]
        self._groups = [step_groups(residency) for residency in self._residencies]
        # Beside a partition's weights there are those read ahead, one layer's state, and what waits to be written.
        self._blocks = BlockPool(0)
        self._beside_bytes = self._largest_state() + 2 * self._io.stream_bytes
        self._active: int | None = None
        self._reader: TensorReader | None = None
        self._stream: ReadAhead | None = None
        self._objective: Objective = workload.objective(plan, len(plan.partitions) - 1)
        self._objective.prepare(device.torch_device)
        # Gradient norms are added up in the order in which the model names its parameters.
        self._order = {name: number for number, name in enumerate(workload.chain.persistent)}

    def train_batch(self, batch: Batch, step: int, micro_batch: int) -> float:
        """All visits of one batch.

        Args:
            batch: tensors of the first boundary (B, ...) and labels (B, ...), on the host.
            step: optimizer steps of this sweep before it.
            micro_batch: samples on the device at once.

        Returns:
            The batch's mean loss.

        Raises:
            DivergedError: the loss, or a gradient, is not finite.
            CaptureError: a parameter got no gradient.
            Exception: memory ran out (`is_out_of_memory`). Some weights may have been stepped: only a commit can be gone back to.
        """
        tensors, labels = batch
        parts = micro_batches(len(labels), micro_batch, self._plan.smallest_micro_batch)
        work = _Batch(tensors, labels, step, tuple(parts))
        actions: dict[str, Callable[[Visit, _Batch], None]] = {
            "emit": self._emit,
            "backpropagate": self._backpropagate,
            "step": self._step_kept,
        }
        with self._weights.tensors(self._blocks.empty) as self._reader:
            self._stream = ReadAhead(self._requests(step), self._threads.read, self._io.stream_bytes)
            try:
                for visit in self._sweep.visits:
                    self._on_visit(visit.partition)
                    actions[visit.action](visit, work)
            finally:
                self._stream.close()
        self._scratch.clear()
        self._written, self._writing_now = self._writing_now, {}
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
        label_shape = self._workload.dataset.label_shape
        parts = micro_batches(samples, micro_batch, self._plan.smallest_micro_batch)
        tensors = tuple(torch.zeros(samples, *spec.shape, dtype=spec.dtype) for spec in before) if number == 0 else ()
        work = _Batch(tensors, torch.zeros(samples, *label_shape, dtype=torch.int64), 0, tuple(parts))
        for part_number, part in enumerate(parts):
            size = part.stop - part.start
            if number > 0:
                boundary = [torch.zeros(size, *spec.shape, dtype=spec.dtype) for spec in before]
                self._scratch.put(("boundary", number, part_number), boundary)
            gradients = [
                torch.zeros(size, *spec.shape, dtype=spec.dtype) if spec.dtype.is_floating_point else None for spec in after
            ]
            self._scratch.put(("gradient", number + 1, part_number), gradients)
        visit = Visit("backpropagate", number, "train", learns=True, hands_back=number > 0)
        with self._weights.tensors() as self._reader:
            self._stream = ReadAhead(self._weight_requests(self._residencies[number].keys()), self._threads.read, 0)
            try:
                self._backward(visit, work)
            finally:
                self._stream.close()
                self.close()

    def settle(self) -> None:
        """Wait until all that was stepped is in the weight files: before a commit.

        Raises:
            DiskError: it could not be written.
        """
        self._behind.wait()

    def leave(self) -> None:
        """Take the resident partition off the device."""
        if self._active is not None:
            self._residencies[self._active].unload()
            self._active = None

    def rest(self) -> None:
        """Free all memory, for something else to be done before the next batch."""
        self.leave()
        self._blocks.clear()

    def close(self) -> None:
        """Give everything up: what waits to be written is written, or not."""
        self._behind.abandon()
        self._written, self._writing_now = {}, {}
        for residency in self._residencies:
            for parameter in residency.parameters.values():
                parameter.grad = None
        self.rest()
        self._scratch.close()

    def title(self, number: int) -> str:
        """A partition in words."""
        return self._plan.title(number, [layer.name for layer in self._workload.chain.layers])

    # The visits.

    def _emit(self, visit: Visit, work: _Batch) -> None:
        residency = self._enter(visit)
        for number, part in enumerate(work.parts):
            before = self._begin_random(visit.partition, number, work.step)
            inputs = self._inputs(visit.partition, number, part, work)
            with torch.no_grad():
                outputs = forward(residency.layers, inputs)
            self._scratch.put(
                ("boundary", visit.partition + 1, number), [self._device.fetch(tensor.detach()) for tensor in outputs]
            )
            del inputs, outputs
            after = self._device.random_state()
            if any(not torch.equal(one, other) for one, other in zip(before, after, strict=True)):
                self._scratch.put(("random", visit.partition + 1, number), after)
            self._device.check_budget()
        self.leave()

    def _backpropagate(self, visit: Visit, work: _Batch) -> None:
        residency = self._backward(visit, work)
        if visit.partition == len(self._plan.partitions) - 1 and not math.isfinite(work.loss):
            raise DivergedError(
                f"the loss became {work.loss} in {self.title(visit.partition)}, step {work.step + 1}; the last commit is kept; "
                "try a lower --lr"
            )
        if not visit.learns:
            return
        residency.settle_buffers()
        for name, parameter in residency.trainable.items():
            if parameter.grad is None and name not in residency.borrowed:
                raise CaptureError(
                    f"parameter {name!r} got no gradient in {self.title(visit.partition)}, and would never be trained; freeze it "
                    "(requires_grad_(False)), or have the model's forward use it for every batch"
                )
        with self._open(visit.partition) as (file, is_new):
            # Frozen weights go into a new file once; buffers change with every batch.
            for name, parameter in residency.parameters.items():
                if is_new and not parameter.requires_grad and name not in residency.borrowed:
                    self._write(visit.partition, file, weight_key(name), parameter)
            for name, buffer in residency.buffers.items():
                # A copy: the next batch's forward changes it, if the partition stays, while this is being written.
                self._write(visit.partition, file, weight_key(name), buffer.clone())
            for names in self._groups[visit.partition]:
                parameters = {name: residency.parameters[name] for name in names}
                if visit.keeps_gradients:
                    self._keep(visit.partition, parameters, work)
                else:
                    self._step(visit.partition, parameters, work, file)

    def _backward(self, visit: Visit, work: _Batch) -> Residency:
        """Forward once more and back, micro-batch by micro-batch."""
        residency = self._enter(visit)
        own = visit.partition
        for number, part in enumerate(work.parts):
            self._begin_random(own, number, work.step)
            inputs = self._inputs(own, number, part, work)
            leaves = tuple(
                tensor.requires_grad_() if visit.hands_back and tensor.is_floating_point() else tensor for tensor in inputs
            )
            del inputs
            hooks = self._add_shared(residency, number)
            if own == len(self._plan.partitions) - 1:
                share = (part.stop - part.start) / len(work.labels)
                labels = place_aligned(self._device, work.labels[part])
                layers, chunk = residency.layers, self._plan.loss_chunk
                work.loss += backward_from_loss(layers, leaves, labels, self._objective, share, chunk)
            else:
                self._backward_from_boundary(residency, leaves, ("gradient", own + 1, number))
            for hook in hooks:
                hook.remove()
            if visit.hands_back:
                gradients = [None if leaf.grad is None else self._device.fetch(leaf.grad) for leaf in leaves]
                self._scratch.put(("gradient", own, number), gradients)
                del gradients
            del leaves
            self._keep_shared(residency, number)
            self._scratch.drop(("boundary", own, number))
            self._device.check_budget()
        return residency

    def _backward_from_boundary(self, residency: Residency, inputs: tuple[Tensor, ...], key: tuple[str, int, int]) -> None:
        outputs = forward(residency.layers, inputs)
        roots, gradients = [], []
        for output, gradient in zip(outputs, self._scratch.pop(key), strict=True):
            if gradient is not None and output.requires_grad:
                roots.append(output)
                gradients.append(self._device.place(gradient))
        del outputs
        if roots:
            torch.autograd.backward(roots, gradients)

    def _step_kept(self, visit: Visit, work: _Batch) -> None:
        """Apply kept gradients; the partition need not be resident."""
        self.leave()
        if work.clip_factor is None:
            limit = self._workload.config.clip_norm
            assert limit is not None, "gradients are kept to be clipped"
            norms = [norm for _, norm in sorted(work.norms.items(), key=lambda item: self._order[item[0]])]
            work.clip_factor = clip_factor(norms, limit)
        assert self._stream is not None
        shapes = dict(self._meta_parameters(visit.partition))
        with self._open(visit.partition) as (file, _):
            for names in self._groups[visit.partition]:
                parameters = {}
                for name in names:
                    parameters[name] = nn.Parameter(self._device.place(self._stream.take()), shapes[name].requires_grad)
                    (kept,) = self._scratch.pop(("kept", name))
                    assert kept is not None
                    parameters[name].grad = self._device.place(kept).mul_(work.clip_factor)
                    del kept
                self._step(visit.partition, parameters, work, file)

    # Their parts.

    def _enter(self, visit: Visit) -> Residency:
        residency = self._residencies[visit.partition]
        if self._active != visit.partition:
            self.leave()
            assert self._stream is not None
            self._active = visit.partition
            weights = sum(self._weights.nbytes(key) for key in residency.keys())
            self._blocks.set_limit(weights + self._beside_bytes)
            residency.fill(self._stream.take)
        for layer in residency.layers:
            layer.module.train(visit.learns)
        return residency

    def _inputs(self, partition: int, number: int, part: slice, work: _Batch) -> tuple[Tensor, ...]:
        """A micro-batch at a partition's boundary, on the device."""
        if partition == 0:
            return tuple(place_aligned(self._device, tensor[part]) for tensor in work.tensors)
        kept = self._scratch.get(("boundary", partition, number))
        # Detached once more: a tensor may be kept for two boundaries, and needs a gradient for one of them at a time.
        return tuple(place_aligned(self._device, tensor).detach() for tensor in kept if tensor is not None)

    def _begin_random(self, partition: int, number: int, step: int) -> tuple[Tensor, ...]:
        """Bring the generators to where they were when the micro-batch came to the partition, and return their state."""
        for before in range(partition, 0, -1):
            if ("random", before, number) in self._scratch:
                state = tuple(tensor for tensor in self._scratch.get(("random", before, number)) if tensor is not None)
                self._device.set_random_state(state)
                return state
        word = "forward" if self._sweep.place == "epoch" else "recovery"
        torch.manual_seed(seed_of(self._workload.config.seed, word, 0, step, number))
        return self._device.random_state()

    def _add_shared(self, residency: Residency, number: int) -> list[torch.utils.hooks.RemovableHandle]:
        """Have later partitions' gradients of shared parameters added to this one's, as autograd does in the whole model."""
        hooks = []
        for name in residency.shared:
            parameter = residency.parameters[name]
            if parameter.requires_grad and ("shared", name, number) in self._scratch:
                (kept,) = self._scratch.pop(("shared", name, number))
                assert kept is not None
                carried = self._device.place(kept)
                hooks.append(parameter.register_hook(lambda gradient, carried=carried: carried + gradient))
        return hooks

    def _keep_shared(self, residency: Residency, number: int) -> None:
        """Leave the gradient of parameters that an earlier partition steps."""
        for name in residency.borrowed:
            parameter = residency.parameters[name]
            if parameter.grad is not None:
                self._scratch.put(("shared", name, number), [self._device.fetch(parameter.grad)])
                parameter.grad = None

    def _keep(self, partition: int, parameters: dict[str, nn.Parameter], work: _Batch) -> None:
        """Leave gradients for the steps that come when all of them are there."""
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            norm = torch.linalg.vector_norm(parameter.grad)
            self._check_finite(name, norm, partition, work)
            work.norms[name] = norm
            self._scratch.put(("kept", name), [self._device.fetch(parameter.grad)])
            parameter.grad = None

    def _check_finite(self, name: str, value: Tensor, partition: int, work: _Batch) -> None:
        """Refuse a gradient by its sum or norm, before it gets into the weights."""
        if not math.isfinite(float(value)):
            raise DivergedError(
                f"the gradient of {name!r} is no longer finite in {self.title(partition)}, step {work.step + 1}; "
                "the last commit is kept; try a lower --lr"
            )

    def _step(self, partition: int, parameters: dict[str, nn.Parameter], work: _Batch, file: TensorFile) -> None:
        """Step a layer's parameters, and have them written."""
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            self._check_finite(name, parameter.grad.sum(), partition, work)
        spec = self._workload.optimizer(partition)
        assert self._stream is not None
        take = None if self._forgets_state(work.step) else self._stream.take
        state = take_state(spec, parameters, self._device, take)
        step(spec, parameters, state, self._workload.learning_rate(partition, work.step, self._total_steps))
        for name, parameter in parameters.items():
            self._write(partition, file, weight_key(name), parameter)
            for key, tensor in state[name].items():
                self._write(partition, file, state_key(name, key), tensor)

    @contextmanager
    def _open(self, partition: int) -> Iterator[tuple[TensorFile, bool]]:
        """A partition's working file, closed when the last write is done; and whether it is new, without any of its values."""
        # A resident weight must not change while it is being written.
        for future in self._written.get(partition, ()):
            future.result()
        is_new = not self._weights.has_working(partition)
        file = self._weights.writer(partition)
        try:
            yield file, is_new
        finally:
            self._behind.submit(0, file.close)

    def _write(self, partition: int, file: TensorFile, key: str, tensor: Tensor) -> None:
        host = self._device.fetch(tensor.detach())
        future = self._behind.submit(host.nbytes, lambda: file.write_from(key, host))
        self._writing_now.setdefault(partition, []).append(future)

    # What is read, in which order.

    def _requests(self, step: int) -> Iterator[Request]:
        """All reads of a batch, in the order of `train_batch`."""
        resident = self._active
        for visit in self._sweep.visits:
            number = visit.partition
            meta = dict(self._meta_parameters(number))
            if visit.action == "step":
                resident = None
            elif resident != number:
                yield from self._weight_requests(self._residencies[number].keys())
                resident = number
            if visit.learns and (visit.action == "step" or (visit.action == "backpropagate" and not visit.keeps_gradients)):
                spec = self._workload.optimizer(number)
                for names in self._groups[number]:
                    if visit.action == "step":
                        yield from self._weight_requests([weight_key(name) for name in names])
                    if not self._forgets_state(step):
                        yield from self._weight_requests(state_keys(spec, {name: meta[name] for name in names}))

    def _weight_requests(self, keys: list[str]) -> Iterator[Request]:
        for key in keys:
            yield Request(self._weights.nbytes(key), lambda key=key: self._read(key))  # type: ignore[misc]

    def _read(self, key: str) -> Tensor:
        """On the reading thread: a tensor's bytes after the batch before this one, once they are written."""
        home = self._weights.home(key)
        assert isinstance(home, int)
        for future in self._written.get(home, ()):
            future.result()
        assert self._reader is not None
        return self._reader.read(key)

    def _largest_state(self) -> int:
        """Bytes of the largest optimizer state of a layer."""
        sizes = [0]
        for number in self._sweep.learners:
            meta, spec = dict(self._meta_parameters(number)), self._workload.optimizer(number)
            for names in self._groups[number]:
                sizes.append(sum(map(self._weights.nbytes, state_keys(spec, {name: meta[name] for name in names}))))
        return max(sizes)

    def _forgets_state(self, step: int) -> bool:
        return self._sweep.fresh_state and step == 0

    def _meta_parameters(self, partition: int) -> Iterator[tuple[str, Tensor]]:
        """Shapes of a partition's parameters, by the names they are stored under."""
        residency = self._residencies[partition]
        for layer in residency.layers:
            for alias, tensor in layer.parameters().items():
                yield residency.name_of(alias), tensor
