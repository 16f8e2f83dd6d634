"""Plain training: the memory that plain PyTorch loops would need for the same batch, predicted from the same costs."""

import math
from dataclasses import replace

from lowmem_pnn.profiling.costs import Affine, LayerCost, MemoryProfile, ties_counted_once
from lowmem_pnn.profiling.peaks import default_objective, peak_of
from lowmem_pnn.workload import Workload


def plain_bytes(workload: Workload, profile: MemoryProfile, batch: int) -> int | None:
    """Return `plain_training_bytes` of a workload; None where its profile counts auxiliary heads too.

    Args:
        workload: Model, data and method.
        profile: Costs of the model's layers.
        batch: Samples of an optimizer step.
    """
    return None if workload.method.learns_per_layer else plain_training_bytes(profile, batch)


def plain_training_bytes(profile: MemoryProfile, batch: int) -> int:
    """Return the predicted peak of training the whole model in plain PyTorch, the whole batch at once, in bytes.

    All weights, gradients, optimizer state and activations are in memory at one time; the step comes after the backward.

    Args:
        profile: Costs of the model's layers.
        batch: Samples of an optimizer step.
    """
    layers = [_as_plain(layer) for layer in profile.layers]
    return peak_of(layers, batch, batch, default_objective(layers[-1])) + profile.kernel_bytes


def accumulated_training_bytes(profile: MemoryProfile, batch: int, micro_batch: int) -> int:
    """Return the predicted peak of training the whole model in plain PyTorch, by gradients that add up over micro-batches, in bytes.

    Args:
        profile: Costs of the model's layers.
        batch: Samples of an optimizer step.
        micro_batch: Samples at once.
    """
    layers = [_as_plain(layer) for layer in profile.layers]
    return peak_of(layers, micro_batch, batch, default_objective(layers[-1])) + profile.kernel_bytes


def checkpointed_training_bytes(profile: MemoryProfile, batch: int) -> int:
    """Return the predicted peak of training the whole model in plain PyTorch with activation checkpointing, in bytes.

    Of segments of about the square root of the layers' number, the inputs are kept, and the rest is computed again for the backward.

    Args:
        profile: Costs of the model's layers.
        batch: Samples of an optimizer step.
    """
    layers = [_as_plain(layer) for layer in ties_counted_once(profile.layers)]
    size = math.ceil(math.sqrt(len(layers)))
    state = sum(layer.weight_bytes + layer.buffer_bytes + layer.optimizer_bytes for layer in layers)
    gradients = sum(layer.gradient_bytes for layer in layers)
    inputs, later, peak = 0, gradients, gradients + max(layer.step_bytes for layer in layers)
    for begin in range(0, len(layers), size):
        segment = [_without_state(layer) for layer in layers[begin : begin + size]]
        later -= sum(layer.gradient_bytes for layer in segment)
        objective = default_objective(layers[-1]) if begin + size >= len(layers) else Affine(0, 0)
        peak = max(peak, inputs + later + peak_of(segment, batch, batch, objective))
        inputs += segment[0].input_bytes.at(batch)
    return state + peak + profile.kernel_bytes


def _without_state(layer: LayerCost) -> LayerCost:
    # What is in memory all the time is counted once for all layers.
    return replace(layer, weight_bytes=0, buffer_bytes=0, optimizer_bytes=0, step_bytes=0, ties=())


def _as_plain(layer: LayerCost) -> LayerCost:
    # Optimizer state is in memory all the time, gradients from their backward to the step, and buffers have no copy.
    return replace(
        layer,
        freed_gradient_bytes=0,
        buffer_bytes=layer.buffer_bytes // 2,
        optimizer_bytes=layer.optimizer_bytes + layer.streamed_state_bytes,
        streamed_state_bytes=0,
    )
