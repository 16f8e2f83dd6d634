"""Forward and backward passes of a sweep: all micro-batches of a batch through one resident partition."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowmem_pnn.device import Device
from lowmem_pnn.engine.passes import backward_from_loss, to_device_aligned
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.engine.uploads import MicroBatch, Uploads
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.methods import Objective, TaskObjective, Visit
from lowmem_pnn.model.call_form import ask_for_gradients
from lowmem_pnn.model.layer import python_state_of, set_python_state
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.sweep.boundary_buffers import BoundaryBuffers
from lowmem_pnn.sweep.kept_products import KeptProducts
from lowmem_pnn.sweep.optimizer_steps import Gradients
from lowmem_pnn.sweep.recompute import unneeded_products, without_products
from lowmem_pnn.sweep.row_gradients import RowGradients
from lowmem_pnn.sweep.vocabulary import head_parameters, in_pieces
from lowmem_pnn.sweep.vocabulary_tiles import backward_by_tiles
from lowmem_pnn.workload import Workload


@dataclass
class SweptBatch:
    """A batch on its way through the partitions.

    Args:
        tensors: tensors of the boundary before the first partition that it goes through, each (B, ...), on the host.
        labels: labels (B, ...), on the host.
        parts: ranges of samples that make its micro-batches.
        gradients: what is known of its gradients.
        loss: sum of the weighted losses of the micro-batches so far.
        unread: losses of micro-batches that are still to be added, each in one or more parts, on a device that is not the host.
    """

    tensors: tuple[Tensor, ...]
    labels: Tensor
    parts: Sequence[slice]
    gradients: Gradients
    loss: float = 0.0
    unread: list[list[Tensor]] = field(default_factory=list)


class SweepPasses:
    """Runs the micro-batches of a batch through a resident partition, forward or backward, between boundary buffers.

    Args:
        workload: model, data and method.
        plan: partitions of the model.
        residencies: residencies of all partitions; the one that a pass is for is loaded.
        device: training device, open.
        buffers: buffers that inputs are taken from, and outputs and gradients are put into.
        products: products of first forwards that second ones take.
        learners: numbers of the partitions that learn.
        first: number of the first partition that batches go through.
    """

    def __init__(
        self,
        workload: Workload,
        plan: Plan,
        residencies: list[Residency],
        device: Device,
        buffers: BoundaryBuffers,
        products: KeptProducts,
        learners: Sequence[int],
        first: int = 0,
    ) -> None:
        self._plan, self._boundaries = plan, workload.chain.boundaries
        self._learners = learners
        self._first = first
        # What modules held before the forward of a micro-batch, by partition and micro-batch, where they hold such state.
        self._python_states: dict[tuple[int, int], dict[str, Any]] = {}
        self._residencies = residencies
        self._device = device
        self._buffers, self._products = buffers, products
        self._last = len(residencies) - 1
        self._in_pieces = [in_pieces(residency, workload, plan) for residency in residencies]
        self._unneeded = [unneeded_products(residency.layers[-1]) for residency in residencies]
        self._uploads = Uploads(device)
        self._objective: Objective = workload.objective(plan, self._last)
        self._objective.prepare(device.torch_device)

    def forward(self, partition: int, batch: SweptBatch) -> None:
        """Run a batch forward without gradients, and keep the partition's outputs.

        Args:
            partition: number of the partition, not the last.
            batch: batch that has come to the partition's boundary.
        """
        for number, part in enumerate(batch.parts):
            state_before = self._buffers.restore_random_state(partition, number, batch.gradients.step)
            inputs = self._inputs(partition, number, part, batch)
            self._python_states[partition, number] = python_state_of(self._residencies[partition].layers)
            outputs = self._forward_as_in_training(partition, number, inputs)
            self._buffers.put_activations(partition + 1, number, outputs)
            del inputs, outputs
            self._buffers.put_random_state(partition, number, state_before)
            self._device.check_budget()

    def backward(self, visit: Visit, batch: SweptBatch) -> None:
        """Run a batch forward once more and backward; gradients add up in the parameters.

        The backward begins at the loss in the last partition, elsewhere at the kept gradients of the next boundary.

        Args:
            visit: the `backpropagate` visit.
            batch: batch that has come back to the partition.

        Raises:
            CaptureError: the forward changed a buffer that other partitions hold too.
        """
        partition, residency = visit.partition, self._residencies[visit.partition]
        if partition == self._last and self._plan.vocabulary_tile:
            self._backward_by_vocabulary(visit, batch, self._plan.vocabulary_tile)
            return
        rows = RowGradients({id(one): name for name, one in residency.parameters.items() if name in self._in_pieces[partition]})
        shares = self._objective.shares(batch.labels, batch.parts) if partition == self._last else []
        shared = {name: buffer.clone() for name, buffer in residency.buffers.items() if name in residency.shared}
        for number, part in enumerate(batch.parts):
            self._buffers.restore_random_state(partition, number, batch.gradients.step)
            inputs = self._inputs(partition, number, part, batch)
            if (partition, number) in self._python_states:
                set_python_state(residency.layers, self._python_states.pop((partition, number)))
            strides: dict[int, tuple[int, ...]] = {}
            ask_for_gradients(inputs, self._boundaries[self._plan.partitions[partition].start], visit.returns_input_gradient)
            for place, tensor in enumerate(inputs):
                if tensor.requires_grad:
                    tensor.register_hook(partial(_note_strides, strides, place))
            later = self._buffers.add_shared_gradients(residency, number, alone=len(batch.parts) == 1)
            with rows if self._in_pieces[partition] else nullcontext():
                if partition == self._last:
                    self._backward_from_loss(inputs, part, batch, shares[number])
                else:
                    self._backward_from_boundary(partition, inputs, number)
            self._device.keep_to_expected_peak()
            for gradient in later:
                gradient.finish()
            del later
            if visit.returns_input_gradient:
                gradients = [laid_out(tensor.grad, strides.get(place)) for place, tensor in enumerate(inputs)]
                self._buffers.put_gradients(partition, number, gradients)
                del gradients, tensor
            del inputs
            self._buffers.put_shared_gradients(residency, number)
            self._buffers.drop_activations(partition, number)
            self._device.check_budget()
        for name, (ids, gradients_of_rows) in rows.take().items():
            self._buffers.stored.put_rows(name, residency.parameters[name].shape, ids, gradients_of_rows)
        residency.copy_back_replaced_buffers()
        residency.check_shared_buffers(shared)

    def _backward_by_vocabulary(self, visit: Visit, batch: SweptBatch, tile: int) -> None:
        """Run the last layer and the loss forward and backward, the whole batch at once and some classes at a time."""
        partition, residency, stored = visit.partition, self._residencies[visit.partition], self._buffers.stored
        parameters = residency.layers[-1].parameters()
        alias, bias_name = head_parameters(parameters)
        weight, bias = parameters[alias].detach(), None if bias_name is None else parameters[bias_name]
        name = residency.chain.owner_of(alias)
        rows = weight.new_empty(batch.labels.numel(), weight.shape[1])
        per_sample = batch.labels[0].numel()
        shapes = []
        for number, part in enumerate(batch.parts):
            (inputs,) = self._inputs(partition, number, part, batch)
            shapes.append(inputs.shape)
            rows[part.start * per_sample : part.stop * per_sample] = inputs.flatten(0, -2)
            del inputs
            self._buffers.drop_activations(partition, number)
        gradient = torch.zeros_like(rows) if visit.returns_input_gradient else None
        if bias is not None and bias.requires_grad:
            bias.grad = torch.zeros_like(bias)
        if learns := parameters[alias].requires_grad:
            stored.begin_tiles(name, weight.shape)
        assert isinstance(self._objective, TaskObjective), "the last partition of a sweep has the task's loss"
        task = self._objective.task
        batch.loss += backward_by_tiles(
            rows,
            batch.labels.flatten().long(),
            weight,
            None if bias is None else bias.detach(),
            tile=tile,
            ignored=task.ignored,
            smoothing=task.plain_smoothing or 0.0,
            gradient=gradient,
            bias_gradient=None if bias is None else bias.grad,
            write=partial(stored.put_tile, name) if learns else None,
        )
        del rows
        self._device.keep_to_expected_peak()
        for number, (part, shape) in enumerate(zip(batch.parts, shapes, strict=True)):
            if gradient is not None:
                own = gradient[part.start * per_sample : part.stop * per_sample].view(shape)
                self._buffers.put_gradients(partition, number, [own])
        self._device.check_budget()

    def _forward_as_in_training(self, partition: int, number: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run layers with gradients, each layer's let go at its end: some of PyTorch's kernels are others where none are wanted."""
        learns = bool(self._learners) and partition > min(self._learners)
        layers, start = self._residencies[partition].layers, self._plan.partitions[partition].start
        for index, layer in enumerate(layers, start):
            inputs = ask_for_gradients(map(Tensor.detach, inputs), self._boundaries[index], learns)
            unneeded = self._unneeded[partition] if layer is layers[-1] else ()
            with torch.set_grad_enabled(layer.compiled is None), self._products.keeping(index, number, unneeded) as finish:
                inputs = finish(layer(*inputs))
            self._device.keep_to_expected_peak()
            learns = learns or any(parameter.requires_grad for parameter in layer.parameters().values())
        return tuple(tensor.detach() for tensor in inputs)

    def _forward_again(self, partition: int, number: int, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        layers, start = self._residencies[partition].layers, self._plan.partitions[partition].start
        with self._products.reading(range(start, start + len(layers)), number):
            for index, layer in enumerate(layers, start):
                with self._products.taking(index, number):
                    inputs = layer(*inputs)
                self._device.keep_to_expected_peak()
        return inputs

    def close(self) -> None:
        """Drop the upload under way; passes may go on later."""
        self._uploads.drop()

    def _inputs(self, partition: int, number: int, part: slice, batch: SweptBatch) -> tuple[Tensor, ...]:
        """Return a micro-batch at a partition's boundary, on the device, and begin the upload of the next one."""

        def micro_batch(number: int, part: slice) -> MicroBatch:
            if partition == self._first:
                return MicroBatch(("samples", number), lambda: tuple(tensor[part] for tensor in batch.tensors))
            return MicroBatch((partition, number), lambda: self._buffers.activations(partition, number))

        following = batch.parts[number + 1 : number + 2]
        return self._uploads.take(micro_batch(number, part), micro_batch(number + 1, following[0]) if following else None)

    def _backward_from_loss(self, inputs: tuple[Tensor, ...], part: slice, batch: SweptBatch, weight: float) -> None:
        labels = to_device_aligned(self._device, batch.labels[part])
        layers, scale = self._residencies[self._last].layers, batch.gradients.scale
        unread: list[Tensor] | None = None if self._device.shares_host else []
        batch.loss += backward_from_loss(layers, inputs, labels, self._objective, weight, self._plan.loss_chunk, scale, unread)
        if unread is not None:
            batch.unread.append(unread)

    def read_loss(self, batch: SweptBatch) -> None:
        """Add the losses that are still on the device to the batch's, as if each had been read at once; the host waits for them once.

        Args:
            batch: batch that has come back from the last partition.
        """
        if not batch.unread:
            return
        values = iter(self._device.to_host(torch.stack([part.float() for parts in batch.unread for part in parts])).tolist())
        for parts in batch.unread:
            loss = 0.0
            for _ in parts:
                loss += next(values)
            batch.loss += loss
        batch.unread.clear()

    def _backward_from_boundary(self, partition: int, inputs: tuple[Tensor, ...], number: int) -> None:
        # The forward visit has kept the outputs: only their gradients are needed now.
        with without_products(self._unneeded[partition]):
            outputs = self._forward_again(partition, number, inputs)
        after = self._boundaries[self._plan.partitions[partition].stop]
        if any(output.requires_grad and not spec.takes_gradient for output, spec in zip(outputs, after, strict=True)):
            raise CaptureError(
                f"partition {partition + 1} hands on a tensor that depends on weights which learn, and did not while the model was captured: by "
                "the number of samples, or by values; decide by neither what a gradient comes to"
            )
        pairs = zip(outputs, self._buffers.pop_gradients(partition + 1, number), strict=True)
        learning = [(output, gradient) for output, gradient in pairs if gradient is not None and output.requires_grad]
        del outputs, pairs
        if learning:
            torch.autograd.backward([output for output, _ in learning], [gradient for _, gradient in learning])


def _note_strides(strides: dict[int, tuple[int, ...]], place: int, gradient: Tensor) -> None:
    strides[place] = gradient.stride()


def laid_out(gradient: Tensor | None, strides: tuple[int, ...] | None) -> Tensor | None:
    """Return a gradient in the layout in which backward has made it: kernels that take it round differently for another one.

    Args:
        gradient: gradient of a leaf, which PyTorch has brought into the leaf's own layout.
        strides: strides in which it was made; None where it was not.
    """
    if gradient is None or strides is None or gradient.stride() == strides:
        return gradient
    made = torch.empty_strided(gradient.shape, strides, device="meta")
    if not made.permute(sorted(range(made.dim()), key=lambda axis: (-strides[axis], axis))).is_contiguous():
        return gradient  # one value stands for many
    return torch.empty_strided(gradient.shape, strides, dtype=gradient.dtype, device=gradient.device).copy_(gradient)
