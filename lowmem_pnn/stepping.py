"""The optimizer's step of a partition whose state is not resident: a layer at a time, its state read before and written after.

disk --exp_avg, exp_avg_sq--> [ one layer's state, weights and gradients ] --step--> disk
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lowmem_pnn.device import Device
from lowmem_pnn.optimizers import OptimizerSpec
from lowmem_pnn.stores.naming import state_key


def state_keys(spec: OptimizerSpec, parameters: Mapping[str, Tensor]) -> list[str]:
    """The names, in weight files, of the optimizer's state of some parameters, in the order of `take_state`."""
    return [state_key(name, state) for name, tensor in parameters.items() for state in spec.layout(tensor)]


def take_state(
    spec: OptimizerSpec, parameters: Mapping[str, Tensor], device: Device, take: Callable[[], Tensor] | None
) -> dict[str, dict[str, Tensor]]:
    """State on the device.

    Args:
        spec: the optimizer.
        parameters: by name.
        device: where they are.
        take: gives the tensors of `state_keys`, one after the other; None for the state before the first step.
    """

    def tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if take is None:
            return torch.zeros(shape, dtype=dtype, device=device.torch_device)
        found = device.place(take())
        assert found.shape == shape, "state is taken in the order in which it is read"  # a fused step would not ask
        return found

    return {
        name: {state: tensor(*layout) for state, layout in spec.layout(parameter).items()}
        for name, parameter in parameters.items()
    }


def step(
    spec: OptimizerSpec, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Mapping[str, Tensor]], lr: float
) -> None:
    """One step of parameters that have gradients, which are dropped.

    Args:
        spec: the optimizer.
        parameters: by name.
        state: by name, changed in place.
        lr: learning rate of this step.
    """
    optimizer = spec.build(parameters, state)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    for parameter in parameters.values():
        parameter.grad = None
