"""Optimizer steps of a sweep: each layer steps in backward and is written behind, or its gradients are kept until all are complete.

    in backward   state --prefetch--> [ one layer: weights, gradients, state ] --write-behind-->
    kept          gradients --> scratch store ... [ norm of all of them ] ... weights, gradients, state --> step

Gradients are kept where no layer may step before all of them are there: to clip their norm, or since any of them may have overflowed.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowmem_pnn.device import Device
from lowmem_pnn.engine.optimizer_in_backward import after_backward_names, step_order
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.errors import DivergedError
from lowmem_pnn.methods import Sweep
from lowmem_pnn.model.precision import LossScale, unscale
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.stores.keys import state_key, weight_key
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.sweep.boundary_buffers import BoundaryBuffers
from lowmem_pnn.sweep.weight_streamer import WeightStreamer
from lowmem_pnn.workload import Workload


@dataclass
class Gradients:
    """What is known of the gradients of one batch; their values are elsewhere.

    Args:
        step: number of optimizer steps before the batch.
        scale: factor on the loss.
        norms: norms of the gradients that are kept, by parameter.
        total_norm: norm of all kept gradients together, from the first step by them on.
        overflowed: whether a gradient is not finite, which a smaller scale may mend.
    """

    step: int
    scale: LossScale
    norms: dict[str, Tensor] = field(default_factory=dict)
    total_norm: Tensor | None = None
    overflowed: bool = False


class SweepOptimizerSteps:
    """Steps the partitions of a sweep, group by group; a group is the parameters of one layer.

    Args:
        workload: model, data and method.
        plan: partitions of the model.
        sweep: visits of a batch.
        residencies: residencies of all partitions.
        device: training device, open.
        total_steps: optimizer steps of the whole sweep, which the learning rate's schedule stretches over.
    """

    after_backward: list[frozenset[str]]
    """By partition, the parameters whose gradients are complete only after backward, even if a batch goes through at once."""

    def __init__(
        self, workload: Workload, plan: Plan, sweep: Sweep, residencies: list[Residency], device: Device, total_steps: int
    ) -> None:
        self._workload = workload
        self._plan = plan
        self._sweep = sweep
        self._residencies = residencies
        self._device = device
        self._total_steps = total_steps
        # Gradient norms are added up in the order in which the model names its parameters.
        self._rank = {name: number for number, name in enumerate(workload.chain.persistent)}
        self.after_backward = [
            after_backward_names(
                residency.layers,
                workload.chain.owner_of,
                per_layer_loss=False,
                in_chunks=residency is residencies[-1] and plan.loss_chunk is not None,
            )
            for residency in residencies
        ]
        # Names in weight files of the optimizer state, by partition and group; they do not change.
        self._state_keys = [self._state_keys_by_group(number) for number in range(len(residencies))]

    def keys(self, partition: int, step: int, *, with_weights: bool) -> Iterator[str]:
        """Yield the names in weight files of the tensors that a partition's steps take, in the order of taking.

        Args:
            partition: number of the partition.
            step: number of optimizer steps before the batch.
            with_weights: whether the weights are taken too, since they are not resident.
        """
        for group in step_order(self._residencies[partition].groups, self.after_backward[partition]):
            if with_weights:
                yield from map(weight_key, self._residencies[partition].groups[group])
            if not self._starts_with_fresh_state(step):
                yield from self._state_keys[partition][group]

    def step_group(self, partition: int, group: int, gradients: Gradients, streamer: WeightStreamer, file: TensorFile) -> None:
        """Step a group of a resident partition by the gradients in its parameters, and have the group written.

        Args:
            partition: number of the partition.
            group: number of the group in the partition.
            gradients: what is known of the batch's gradients.
            streamer: source of the optimizer state, and target of what is written.
            file: open working file of the partition.

        Raises:
            DivergedError: a gradient is not finite.
        """
        residency = self._residencies[partition]
        parameters = {name: residency.parameters[name] for name in residency.groups[group]}
        self._step(partition, parameters, gradients, streamer, file)

    def keep_gradients(self, partition: int, group: int, gradients: Gradients, buffers: BoundaryBuffers) -> None:
        """Keep the gradients of a group of a resident partition for `step_kept`.

        Args:
            partition: number of the partition.
            group: number of the group in the partition.
            gradients: what is known of the batch's gradients; norms and overflow are noted in it.
            buffers: buffers that keep the gradients.

        Raises:
            DivergedError: a gradient is not finite, where the loss scale is not adjusted.
        """
        residency = self._residencies[partition]
        for name in residency.groups[group]:
            parameter = residency.parameters[name]
            assert parameter.grad is not None
            gradients.overflowed |= not unscale([parameter.grad], gradients.scale)
            gradients.norms[name] = torch.linalg.vector_norm(parameter.grad)
            if not gradients.scale.moves:
                self._check_finite(name, gradients.norms[name], partition, gradients)
            buffers.put_parameter_gradient(name, parameter.grad)
            parameter.grad = None

    def step_kept(
        self, partition: int, gradients: Gradients, streamer: WeightStreamer, buffers: BoundaryBuffers, file: TensorFile
    ) -> None:
        """Step a partition, which need not be resident, by the gradients that were kept, and have it written.

        Args:
            partition: number of the partition.
            gradients: what is known of the batch's gradients; the norm of all of them is noted in it.
            streamer: source of the weights and the optimizer state, and target of what is written.
            buffers: buffers that keep the gradients.
            file: open working file of the partition.

        Raises:
            DivergedError: a gradient is not finite.
        """
        clip_norm = self._workload.config.clip_norm
        if gradients.total_norm is None:
            # The norm of the norms, as `clip_grad_norm_` has it.
            norms = [norm for _, norm in sorted(gradients.norms.items(), key=lambda item: self._rank[item[0]])]
            gradients.total_norm = nn.utils.get_total_norm(norms)
        groups = self._residencies[partition].groups
        for group in step_order(groups, self.after_backward[partition]):
            parameters = {}
            for name in groups[group]:
                parameters[name] = nn.Parameter(self._device.to_device(streamer.take()))
                parameters[name].grad = buffers.pop_parameter_gradient(name)
            if clip_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters.values(), clip_norm, gradients.total_norm)
            self._step(partition, parameters, gradients, streamer, file)

    def _step(
        self,
        partition: int,
        parameters: dict[str, nn.Parameter],
        gradients: Gradients,
        streamer: WeightStreamer,
        file: TensorFile,
    ) -> None:
        spec = self._workload.optimizer(partition)
        state = take_state(
            spec, parameters, self._device, None if self._starts_with_fresh_state(gradients.step) else streamer.take
        )
        # Without a step, too, everything is written: the file may be a new one, without any values.
        if not gradients.overflowed:
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                self._check_finite(name, parameter.grad.sum(), partition, gradients)
            step_parameters(
                spec,
                parameters,
                state,
                lambda base: self._workload.learning_rate(partition, gradients.step, self._total_steps, base=base),
            )
        for name, parameter in parameters.items():
            streamer.write(partition, file, weight_key(name), parameter)
            for key, tensor in state[name].items():
                streamer.write(partition, file, state_key(name, key), tensor)

    def _check_finite(self, name: str, value: Tensor, partition: int, gradients: Gradients) -> None:
        """Refuse a gradient by its sum or its norm, before it gets into the weights."""
        if not math.isfinite(float(value)):
            title = self._plan.title(partition, [layer.name for layer in self._workload.chain.layers])
            raise DivergedError(
                f"the gradient of {name!r} is no longer finite in {title}, step {gradients.step + 1}; "
                "the last commit is kept; try a lower --lr"
            )

    def _state_keys_by_group(self, partition: int) -> list[list[str]]:
        residency, spec = self._residencies[partition], self._workload.optimizer(partition)
        shapes = residency.shapes()
        return [state_keys(spec, {name: shapes[name] for name in names}) for names in residency.groups]

    def _starts_with_fresh_state(self, step: int) -> bool:
        return self._sweep.fresh_state and step == 0


def state_keys(spec: OptimizerSpec, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the names in weight files of the optimizer state of some parameters, in the order of `take_state`.

    Args:
        spec: optimizer.
        parameters: parameters by name; only their types and shapes are read.
    """
    return [state_key(name, state) for name, tensor in parameters.items() for state in spec.layout(tensor)]


def take_state(
    spec: OptimizerSpec, parameters: Mapping[str, Tensor], device: Device, take: Callable[[], Tensor] | None
) -> dict[str, dict[str, Tensor]]:
    """Load the optimizer state of some parameters onto the device.

    Args:
        spec: optimizer.
        parameters: parameters by name; only their types and shapes are read.
        device: training device.
        take: function that returns the host tensors of `state_keys`, one after the other; None for the state before the first step.

    Returns:
        The state's tensors by parameter and name.
    """

    def load(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        if take is None:
            return torch.zeros(shape, dtype=dtype, device=device.torch_device)
        tensor = device.to_device(take())
        assert tensor.shape == shape, "state is taken in the order in which it is read"  # a fused step would not ask
        return tensor

    return {
        name: {state: load(*layout) for state, layout in spec.layout(parameter).items()} for name, parameter in parameters.items()
    }


def step_parameters(
    spec: OptimizerSpec,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Mapping[str, Tensor]],
    rate_of: Callable[[float | None], float],
) -> None:
    """Step parameters by their gradients, and free the gradients.

    Args:
        spec: optimizer.
        parameters: parameters by name, on the device.
        state: optimizer state by parameter and name, on the device; changed in place.
        rate_of: returns the learning rate of this step, of parameters with a rate of their own, or of the others (None).
    """
    optimizer = spec.build(parameters, state)
    for group in optimizer.param_groups:
        group["lr"] = rate_of(group.get("rate"))
    optimizer.step()
    for parameter in parameters.values():
        parameter.grad = None
