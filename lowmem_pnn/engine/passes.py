"""Passes: one micro-batch through the layers of a resident partition, forward, and back from the loss.

Where the last layer is wide (a large vocabulary), its outputs and their gradient would set the peak. The layer and the loss are then
computed for some rows at a time:

    inputs --[ body ]--> rows --chunk by chunk--[ last layer ]--> loss of the chunk, and back at once to the chunk's rows
           <--[ body ]-- gradients of all rows
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lowmem_pnn.device import Device
from lowmem_pnn.methods import Labels, Objective
from lowmem_pnn.model.layer import Layer

_T = TypeVar("_T")


# Tensors that compute sees start on this boundary: at other offsets a matrix product's last bits differ.
_ALIGNMENT = 64


def to_device_aligned(device: Device, tensor: Tensor) -> Tensor:
    """A host tensor on the device, from a multiple of 64 bytes on; a copy on another device always begins at one."""
    if device.shares_host and tensor.data_ptr() % _ALIGNMENT:
        tensor = tensor.clone()
    return device.to_device(tensor)


def forward(layers: Sequence[Layer], tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run layers, from the boundary before the first to the one after the last."""
    for layer in layers:
        tensors = layer(*tensors)
    return tensors


def backward_from_loss(
    layers: Sequence[Layer],
    inputs: tuple[Tensor, ...],
    labels: Tensor,
    objective: Objective,
    share: float,
    chunk_rows: int | None,
    scale: float = 1.0,
) -> float:
    """Forward to the loss, and backward: gradients add up in the parameters, and in inputs that require one.

    Args:
        layers: of the partition.
        inputs: its boundary tensors, each (B, ...), on the device.
        labels: (B, ...) on the device.
        objective: gives the mean loss of the micro-batch.
        share: of the batch that the micro-batch is; weighs its loss.
        chunk_rows: rows at a time for the last layer, or None for all.
        scale: what all gradients are to be multiplied by.

    Returns:
        The weighed loss; where it is not finite there are no gradients, or not all.
    """
    if objective.per_layer_loss:
        return _backward_per_layer(layers, inputs, labels, objective, share, scale)
    if chunk_rows is not None and chunk_rows < labels.numel():
        assert isinstance(objective, Labels), "only the true loss is computed in chunks"
        return _backward_in_chunks(layers, inputs, labels, objective, share, chunk_rows, scale)
    loss = objective.loss(forward(layers, inputs), labels)
    if share != 1.0:
        loss = loss * share
    return _backward(loss, scale)


def scores_per_layer(layers: Sequence[Layer], tensors: tuple[Tensor, ...]) -> Iterator[Tensor]:
    """Forward, and the class scores of every layer: its head's, or its outputs where it has none.

    Args:
        layers: of the partition.
        tensors: its boundary tensors, each (B, ...).
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
    """Forward, and something done with the outputs, as many at a time as there is room for.

    Args:
        layers: of the partition.
        inputs: its boundary tensors, each (B, ...).
        labels: (B, ...).
        chunk_rows: rows at a time for the last layer, or None for all.
        work: takes outputs and labels: all, or of a chunk's rows.

    Returns:
        What `work` gave, chunk by chunk.
    """
    if chunk_rows is None or chunk_rows >= labels.numel():
        return [work(forward(layers, inputs), labels)]
    *body, last = layers
    (x,) = forward(body, inputs)
    return [work(last(rows), targets) for rows, targets in _chunks(x, labels, chunk_rows)]


def _backward(loss: Tensor, scale: float) -> float:
    """The loss, back from which gradients went; nothing is learnt from one that is not finite."""
    # Before backward, in which weights may step.
    value = float(loss.detach())
    if loss.requires_grad and math.isfinite(value):
        torch.autograd.backward(loss if scale == 1.0 else loss * scale)
    return value


def _backward_per_layer(
    layers: Sequence[Layer], tensors: tuple[Tensor, ...], labels: Tensor, objective: Objective, share: float, scale: float
) -> float:
    """Each layer forward to its own loss, and back, before the next; the last one's loss, or the first that is not finite."""
    value = 0.0
    for layer in layers:
        tensors = layer(*tensors)
        scores = layer.scores(tensors)
        loss = objective.loss(scores, labels) * share
        value = _backward(loss, scale)
        if not math.isfinite(value):
            break
        tensors = tuple(tensor.detach() for tensor in tensors)
        del scores, loss
    return value


def _backward_in_chunks(
    layers: Sequence[Layer],
    inputs: tuple[Tensor, ...],
    labels: Tensor,
    objective: Labels,
    share: float,
    chunk_rows: int,
    scale: float,
) -> float:
    *body, last = layers
    (x,) = forward(body, inputs)
    # Each chunk's own; views of one tensor would get a gradient of the whole tensor's size, chunk by chunk.
    gradient = torch.empty(x.shape, dtype=x.dtype, device=x.device) if x.requires_grad else None
    loss_sum, begin = 0.0, 0
    for rows, targets in _chunks(x.detach(), labels, chunk_rows):
        rows = rows.detach().requires_grad_(gradient is not None)
        loss = objective.loss(last(rows), targets, reduction="sum") / labels.numel()
        if share != 1.0:
            loss = loss * share
        loss_sum += _backward(loss, scale)
        if gradient is not None and rows.grad is not None:
            gradient.flatten(0, -2)[begin : begin + len(rows)] = rows.grad
        begin += len(rows)
        del rows, loss
    if gradient is not None and math.isfinite(loss_sum):
        torch.autograd.backward(x, gradient)
    return loss_sum


def _chunks(x: Tensor, labels: Tensor, chunk_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (R, features) of a tensor (..., features), with their labels (R,)."""
    yield from zip(x.flatten(0, -2).split(chunk_rows), labels.flatten().split(chunk_rows), strict=True)
