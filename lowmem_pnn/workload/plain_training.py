"""Plain training: the memory that a plain PyTorch loop would need for the same batch, predicted from the same costs."""

from dataclasses import replace

from lowmem_pnn.profiling.costs import LayerCost, MemoryProfile
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


def _as_plain(layer: LayerCost) -> LayerCost:
    # Optimizer state is in memory all the time, gradients from their backward to the step, and buffers have no copy.
    return replace(
        layer,
        freed_gradient_bytes=0,
        buffer_bytes=layer.buffer_bytes // 2,
        optimizer_bytes=layer.optimizer_bytes + layer.streamed_state_bytes,
        streamed_state_bytes=0,
    )
