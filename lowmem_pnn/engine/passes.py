"""Forward and backward passes of one micro-batch through the layers of a resident partition.

Where the last layer is wide (a large vocabulary), its outputs and their gradient would set the peak. The layer and the loss are then
computed for some rows at a time:

    inputs --[ body ]--> rows --chunk by chunk--[ last layer ]--> loss of the chunk, and back at once to the chunk's rows
           <--[ body ]-- gradients of all rows
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TypeVar

import torch
from torch import Tensor

from lowmem_pnn.device import Device
from lowmem_pnn.engine.gradient_tiles import GradientTiles
from lowmem_pnn.methods import Objective, TaskObjective
from lowmem_pnn.model.layer import Layer
from lowmem_pnn.model.precision import UNSCALED, LossScale

_T = TypeVar("_T")

# Tensors that layers compute with begin at multiples of so many bytes: at other addresses the last bits of a matrix product differ.
_ALIGNMENT = 64


def to_device_aligned(device: Device, tensor: Tensor) -> Tensor:
    """Copy a host tensor to the device, at a multiple of 64 bytes.

    Where host and device are one, the tensor is copied only if it begins elsewhere; a copy on another device always begins there.
    """
    if device.shares_host and tensor.data_ptr() % _ALIGNMENT:
        tensor = tensor.clone()
    return device.to_device(tensor)


def forward(layers: Sequence[Layer], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run layers, and return the tensors of the boundary after the last layer.

    Args:
        layers: neighbouring layers of the chain.
        tensors: tensors of the boundary before the first layer, each (B, ...).
    """
    for layer in layers:
        tensors = layer(*tensors)
    return tensors


def backward_from_loss(
    layers: Sequence[Layer],
    inputs: tuple[Tensor, ...],
    labels: Tensor,
    objective: Objective,
    weight: float,
    chunk_rows: int | None,
    scale: LossScale = UNSCALED,
    unread: list[Tensor] | None = None,
) -> float:
    """Run forward to the loss, and backward: gradients add up in the parameters, and in the inputs that require a gradient.

    Args:
        layers: layers of the partition.
        inputs: boundary tensors before the partition, each (B, ...), on the device.
        labels: labels (B, ...), on the device.
        objective: objective that gives the mean loss of the micro-batch.
        weight: factor on the loss: the micro-batch's share of its batch; 0 where nothing in it counts.
        chunk_rows: rows for which the last layer is computed at once, or None for all.
        scale: factor on all gradients. Where it is adjusted, a loss that is not finite goes back too, since gradients tell of it.
        unread: takes the loss, or that of each chunk, in place of what is returned, which is then 0: the host waits for nothing, and
            whatever the loss is, it goes back. Not for losses of layers.

    Returns:
        The weighted loss; where it is not finite, and the scale is not adjusted, there are no gradients, or not all.
    """
    if objective.per_layer_loss:
        return _backward_per_layer(layers, inputs, labels, objective, weight, scale)
    if chunk_rows is not None and chunk_rows < labels.numel():
        assert isinstance(objective, TaskObjective), "only the true loss is computed in chunks"
        return _backward_in_chunks(layers, inputs, labels, objective, weight, chunk_rows, scale, unread)
    return _backward(_weighted_loss(objective, forward(layers, inputs), labels, weight), scale, unread)


def scores_per_layer(layers: Sequence[Layer], tensors: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Run forward, and yield the class scores of every layer: those of its head, or its outputs where it has none.

    Args:
        layers: layers of the partition.
        tensors: boundary tensors before the partition, each (B, ...).
    """
    for layer in layers:
        tensors = layer(*tensors)
        yield layer.scores(tensors)[0]


def outputs_in_chunks(
    layers: Sequence[Layer],
    inputs: tuple[Tensor, ...],
    labels: Tensor,
    chunk_rows: int | None,
    work: Callable[[tuple[Tensor, ...], Tensor], _T],
) -> list[_T]:
    """Run forward, and call a function on the outputs, of as many rows at a time as there is room for.

    Args:
        layers: layers of the partition.
        inputs: boundary tensors before the partition, each (B, ...).
        labels: labels (B, ...).
        chunk_rows: rows for which the last layer is computed at once, or None for all.
        work: function of outputs and labels: of all rows, or of a chunk's rows.

    Returns:
        The results of `work`, chunk by chunk.
    """
    if chunk_rows is None or chunk_rows >= labels.numel():
        return [work(forward(layers, inputs), labels)]
    *body, last = layers
    (x,) = forward(body, inputs)
    return [work(last(rows), targets) for rows, targets in _chunks(x, labels, chunk_rows)]


def _weighted_loss(objective: Objective, outputs: tuple[Tensor, ...], labels: Tensor, weight: float) -> Tensor:
    """Return the loss of a micro-batch, times its share of the batch; 0 where nothing counts, of which a mean would be no number."""
    if weight == 0.0:
        # The sum of no elements: outputs may be infinite, and so may be their sum.
        return torch.stack([output.flatten()[:0].sum() for output in outputs if output.is_floating_point()]).sum()
    loss = objective.loss(outputs, labels)
    return loss if weight == 1.0 else loss * weight


def _backward(loss: Tensor, scale: LossScale, unread: list[Tensor] | None = None) -> float:
    """Run backward from a loss, unless it is not finite, and return its value."""
    if unread is not None:
        unread.append(loss.detach())
    # Before backward, in which weights may step (but not where the scale moves: then steps wait).
    value = float(loss.detach()) if unread is None else 0.0
    if loss.requires_grad and (math.isfinite(value) or scale.moves):
        torch.autograd.backward(loss if scale.value == 1.0 else loss * scale.value)
    return value


def _backward_per_layer(
    layers: Sequence[Layer], tensors: tuple[Tensor, ...], labels: Tensor, objective: Objective, weight: float, scale: LossScale
) -> float:
    """Run each layer forward to its own loss, and backward, before the next layer.

    Returns:
        The last layer's loss, or the first that is not finite.
    """
    value = 0.0
    for layer in layers:
        tensors = layer(*tensors)
        scores = layer.scores(tensors)
        loss = _weighted_loss(objective, scores, labels, weight)
        value = _backward(loss, scale)
        if not math.isfinite(value) and not scale.moves:
            break
        tensors = tuple(tensor.detach() for tensor in tensors)
        del scores, loss
    return value


def _backward_in_chunks(
    layers: Sequence[Layer],
    inputs: tuple[Tensor, ...],
    labels: Tensor,
    objective: TaskObjective,
    weight: float,
    chunk_rows: int,
    scale: LossScale,
    unread: list[Tensor] | None,
) -> float:
    """Run the last layer forward and backward chunk by chunk, then backward through the layers before it."""
    *body, last = layers
    (x,) = forward(body, inputs)
    # Each chunk is a leaf of its own; views of one tensor would get a gradient of the whole tensor's size, chunk by chunk.
    gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device) if x.requires_grad else None
    # Where nothing counts the sums are 0, whatever they are divided by.
    loss_sum, begin, count = 0.0, 0, objective.count(labels) or 1
    for rows, targets in _chunks(x.detach(), labels, chunk_rows):
        rows = rows.detach().requires_grad_(gradient is not None)
        with GradientTiles() if last.compiled is None else nullcontext():
            (outputs,) = last(rows)
        loss = objective.loss_of_rows(outputs, targets) / count
        if weight != 1.0:
            loss = loss * weight
        loss_sum += _backward(loss, scale, unread)
        if gradient is not None and rows.grad is not None:
            gradient.flatten(0, -2)[begin : begin + len(rows)] = rows.grad
        begin += len(rows)
        del rows, outputs, loss
    if gradient is not None and (math.isfinite(loss_sum) or scale.moves):
        torch.autograd.backward(x, gradient)
    return loss_sum


def _chunks(x: Tensor, labels: Tensor, chunk_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows (R, features) of a tensor (..., features), with their labels (R,)."""
    yield from zip(x.flatten(0, -2).split(chunk_rows), labels.flatten().split(chunk_rows), strict=True)
