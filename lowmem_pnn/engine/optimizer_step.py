"""The optimizer's step of a resident partition: layer by layer, during backward where that is possible, else after it.

A step waits for the end of backward where a batch goes through in several micro-batches (gradients add up), where the norm of all
gradients is to be clipped, and where any of them may have overflowed (fp16).
"""

from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.optimizer_in_backward import OptimizerInBackward
from lowmem_pnn.model.precision import unscale


def layer_steps(active: ActivePartition, step: int, *, one_micro_batch: bool) -> OptimizerInBackward:
    """Return what steps each layer of a partition, in backward or after it.

    Args:
        active: the partition, with its optimizers.
        step: optimizer steps before this one, which the learning rate follows from.
        one_micro_batch: whether the batch goes through at once.
    """
    residency, objective = active.residency, active.objective
    clips_layers = active.clip_norm is not None and objective.per_layer_loss

    def step_layer(number: int) -> None:
        if clips_layers:
            assert active.clip_norm is not None
            residency.clip(active.clip_norm, number)
        optimizer = residency.optimizers[number]
        for group in optimizer.param_groups:
            own = {"base": group["rate"]} if group.get("rate") is not None else {}
            group["lr"] = active.learning_rate(step, **own)
        optimizer.step()
        optimizer.zero_grad()

    return OptimizerInBackward(
        residency.groups,
        residency.parameters,
        active.after_backward,
        step_layer,
        at_once=one_micro_batch and active.steps_in_backward,
        per_layer_loss=objective.per_layer_loss,
    )


def finish_step(active: ActivePartition, steps: OptimizerInBackward) -> None:
    """Step all layers that have not been stepped in backward; none where a gradient has overflowed.

    Args:
        active: the partition; its loss scale is moved on.
        steps: what `layer_steps` gave, after backward.
    """
    gradients = [parameter.grad for parameter in active.residency.trainable.values() if parameter.grad is not None]
    overflowed = not unscale(gradients, active.loss_scale)
    active.loss_scale.update(overflowed=overflowed)
    if overflowed:
        return
    # Layers that learn by losses of their own are clipped one by one, so that the cuts of blocks are nothing to them; only in fp16 does an
    # overflow in one layer leave out the step of its whole block.
    if active.clip_norm is not None and not active.objective.per_layer_loss:
        active.residency.clip(active.clip_norm)
    steps.finish()
