"""What becomes of gradients in a sweep: a layer steps at once and is written behind, or its gradients are kept for a later step.

    at once   state --read ahead--> [ one layer: weights, gradients, state ] --written behind-->
    kept      gradients --> scratch store ... [ norm of all of them ] ... weights, gradients, state --> step

Kept are gradients that nobody may step by before all are there: to clip their norm, or since any of them may have overflowed.
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
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.sweep.boundary_buffers import BoundaryBuffers
from lowmem_pnn.sweep.weight_streamer import WeightStreamer
from lowmem_pnn.workload import Workload


@dataclass
class Gradients:
    """What is known of a batch's gradients.

    Args:
        step: optimizer steps before it.
        scale: of the loss.
        norms: of gradients that are kept for a step, by parameter.
        total_norm: of all of them together, once the first is applied.
        overflowed: one of them is not finite, which a smaller scale may mend.
    """

    step: int
    scale: LossScale
    norms: dict[str, Tensor] = field(default_factory=dict)
    total_norm: Tensor | None = None
    overflowed: bool = False


class SweepOptimizerSteps:
    """Steps the partitions of a sweep, group by group.

    Args:
        workload: model and method.
        plan: how it is cut.
        sweep: the visits of a batch.
        residencies: of all partitions.
        device: open.
        total_steps: optimizer steps of the whole sweep, for the learning rate.
    """

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
        # Of each partition, the parameters whose gradients are whole only after backward, even if a batch goes through at once.
        self.after_backward = [
            after_backward_names(
                own.layers,
                workload.chain.owner_of,
                per_layer_loss=False,
                in_chunks=own is residencies[-1] and plan.loss_chunk is not None,
            )
            for own in residencies
        ]
        # Names in weight files, which do not change: of the optimizer's state of each group.
        self._state_keys = [self._keys_of_state(number) for number in range(len(residencies))]

    def keys(self, partition: int, step: int, *, with_weights: bool) -> Iterator[str]:
        """Names in weight files of the tensors that the steps of a partition take, in their order.

        Args:
            partition: its number.
            step: optimizer steps before.
            with_weights: they are not resident.
        """
        for number in step_order(self._residencies[partition].groups, self.after_backward[partition]):
            if with_weights:
                yield from map(weight_key, self._residencies[partition].groups[number])
            if not self._forgets_state(step):
                yield from self._state_keys[partition][number]

    def largest_state(self, weights: WeightStore) -> int:
        """Bytes of the largest optimizer state of a group."""
        states = (keys for number in self._sweep.learners for keys in self._state_keys[number])
        return max((sum(map(weights.tensor_bytes, keys)) for keys in states), default=0)

    def apply(self, partition: int, number: int, batch: Gradients, supply: WeightStreamer, file: TensorFile) -> None:
        """Step a group of a resident partition, and have it written."""
        residency = self._residencies[partition]
        parameters = {name: residency.parameters[name] for name in residency.groups[number]}
        self._step(partition, parameters, batch, supply, file)

    def keep(self, partition: int, number: int, batch: Gradients, crossing: BoundaryBuffers) -> None:
        """Leave a group's gradients for the steps that come when all of them are there."""
        residency = self._residencies[partition]
        for name in residency.groups[number]:
            parameter = residency.parameters[name]
            assert parameter.grad is not None
            batch.overflowed |= not unscale([parameter.grad], batch.scale)
            batch.norms[name] = torch.linalg.vector_norm(parameter.grad)
            if not batch.scale.moves:
                self._check_finite(name, batch.norms[name], partition, batch)
            crossing.put_whole(name, parameter.grad)
            parameter.grad = None

    def apply_kept(
        self, partition: int, batch: Gradients, supply: WeightStreamer, crossing: BoundaryBuffers, file: TensorFile
    ) -> None:
        """Step a partition by the gradients that were kept; it need not be resident."""
        limit = self._workload.config.clip_norm
        if batch.total_norm is None:
            # The norm of the norms, as `clip_grad_norm_` has it.
            norms = [norm for _, norm in sorted(batch.norms.items(), key=lambda item: self._rank[item[0]])]
            batch.total_norm = nn.utils.get_total_norm(norms)
        groups = self._residencies[partition].groups
        for number in step_order(groups, self.after_backward[partition]):
            parameters = {}
            for name in groups[number]:
                parameters[name] = nn.Parameter(self._device.to_device(supply.take()))
                parameters[name].grad = crossing.pop_whole(name)
            if limit is not None:
                nn.utils.clip_grads_with_norm_(parameters.values(), limit, batch.total_norm)
            self._step(partition, parameters, batch, supply, file)

    def _step(
        self, partition: int, parameters: dict[str, nn.Parameter], batch: Gradients, supply: WeightStreamer, file: TensorFile
    ) -> None:
        spec = self._workload.optimizer(partition)
        state = take_state(spec, parameters, self._device, None if self._forgets_state(batch.step) else supply.take)
        # A step that is left out is written all the same: the file may be a new one, without any values.
        if not batch.overflowed:
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                self._check_finite(name, parameter.grad.sum(), partition, batch)
            step(spec, parameters, state, self._workload.learning_rate(partition, batch.step, self._total_steps))
        for name, parameter in parameters.items():
            supply.write(partition, file, weight_key(name), parameter)
            for key, tensor in state[name].items():
                supply.write(partition, file, state_key(name, key), tensor)

    def _check_finite(self, name: str, value: Tensor, partition: int, batch: Gradients) -> None:
        """Refuse a gradient by its sum or norm, before it gets into the weights."""
        if not math.isfinite(float(value)):
            title = self._plan.title(partition, [layer.name for layer in self._workload.chain.layers])
            raise DivergedError(
                f"the gradient of {name!r} is no longer finite in {title}, step {batch.step + 1}; "
                "the last commit is kept; try a lower --lr"
            )

    def _keys_of_state(self, partition: int) -> list[list[str]]:
        residency, spec = self._residencies[partition], self._workload.optimizer(partition)
        meta = residency.shapes()
        return [state_keys(spec, {name: meta[name] for name in names}) for names in residency.groups]

    def _forgets_state(self, step: int) -> bool:
        return self._sweep.fresh_state and step == 0


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
        found = device.to_device(take())
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
