"""Optimizer steps of a sweep: each layer steps in backward and is written behind, or its gradients are kept until all are complete.

    in backward   state --prefetch--> [ one layer: weights, gradients; a slice of the state ] --write-behind-->
    kept          gradients --> scratch store ... [ norm of all of them ] ... slices of weights, gradients, state --> step

Gradients are kept where no layer may step before all of them are there: to clip their norm, or since any of them may have overflowed.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowmem_pnn.device import Device
from lowmem_pnn.engine.optimizer_in_backward import after_backward_names, step_order
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.errors import DivergedError
from lowmem_pnn.model.precision import LossScale, all_finite, unscaled_sums
from lowmem_pnn.optim.optimizers import COUNT, OptimizerSpec, SlicedParameter
from lowmem_pnn.optim.step_slices import StepSlice, state_elements, step_slices
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.stores.keys import state_key, weight_key
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.sweep.boundary_buffers import BoundaryBuffers
from lowmem_pnn.sweep.packs import Piece, Write
from lowmem_pnn.sweep.stored_gradients import part_of
from lowmem_pnn.sweep.vocabulary import in_pieces
from lowmem_pnn.sweep.weight_streamer import WeightStreamer
from lowmem_pnn.workload import Workload


@dataclass
class Gradients:
    """What is known of the gradients of one batch; their values are elsewhere.

    Args:
        step: number of optimizer steps before the batch.
        scale: factor on the loss.
        fresh_state: whether the optimizer's state is a new one, and not read.
        norms: norms of the gradients that are kept, by parameter.
        total_norm: norm of all kept gradients together, from the first step by them on.
        overflowed: whether a gradient is not finite, which a smaller scale may mend.
        unread: partition, parameter, and a number that is finite if its gradient is: still on a device that is not the host.
    """

    step: int
    scale: LossScale
    fresh_state: bool = False
    norms: dict[str, Tensor] = field(default_factory=dict)
    total_norm: Tensor | None = None
    overflowed: bool = False
    unread: list[tuple[int, str, Tensor]] = field(default_factory=list)


class SweepOptimizerSteps:
    """Steps the partitions of a sweep, group by group; a group is the parameters of one layer.

    Args:
        workload: model, data and method.
        plan: partitions of the model.
        residencies: residencies of all partitions.
        device: training device, open.
        total_steps: optimizer steps of the whole sweep, which the learning rate's schedule stretches over.
    """

    after_backward: list[frozenset[str]]
    """By partition, the parameters whose gradients are complete only after backward, even if a batch goes through at once."""

    def __init__(self, workload: Workload, plan: Plan, residencies: list[Residency], device: Device, total_steps: int) -> None:
        self._workload = workload
        self._plan = plan
        self._residencies = residencies
        self._device = device
        self._total_steps = total_steps
        most_elements = device.buffer_sizes.slice_elements
        # Gradient norms are added up in the order in which the model names its parameters.
        self._rank = {name: number for number, name in enumerate(workload.chain.persistent)}
        owner_of, chunked = workload.chain.owner_of, residencies[-1] if plan.loss_chunk is not None else None
        self.after_backward = [
            after_backward_names(residency.layers, owner_of, per_layer_loss=False, in_chunks=residency is chunked)
            | in_pieces(residency, workload, plan)
            for residency in residencies
        ]
        # What is stepped at one time, by partition and group; it does not change.
        self._shapes = [residency.shapes() for residency in residencies]
        self._slices = [
            [list(step_slices({name: shapes[name] for name in names}, most_elements)) for names in residency.groups]
            for residency, shapes in zip(residencies, self._shapes, strict=True)
        ]

    def pieces(self, partition: int, *, with_weights: bool, fresh_state: bool) -> Iterator[Piece]:
        """Yield the pieces of the weight files that a partition's steps take, in the order of taking.

        Args:
            partition: number of the partition.
            with_weights: whether the weights are taken too, since they are not resident.
            fresh_state: whether the optimizer's state is a new one, and not taken.
        """
        spec, shapes = self._workload.optimizer(partition), self._shapes[partition]
        for group in step_order(self._residencies[partition].groups, self.after_backward[partition]):
            for number, parts in enumerate(self._slices[partition][group]):
                pack = ("state", partition, group, number)
                if with_weights:
                    for part in parts:
                        yield Piece(weight_key(part.name), None if part.is_whole else part.elements, pack)
                if not fresh_state:
                    for part in parts:
                        yield from state_pieces(spec, shapes[part.name], part, pack)

    def step_group(
        self,
        partition: int,
        group: int,
        gradients: Gradients,
        streamer: WeightStreamer,
        buffers: BoundaryBuffers,
        file: TensorFile,
    ) -> None:
        """Step a group of a resident partition by the gradients in its parameters, and have the group written.

        Args:
            partition: number of the partition.
            group: number of the group in the partition.
            gradients: what is known of the batch's gradients.
            streamer: source of the optimizer state, and target of what is written.
            buffers: buffers that gradients lie in which are made in pieces.
            file: open working file of the partition.

        Raises:
            DivergedError: a gradient is not finite.
        """
        residency = self._residencies[partition]
        target = _Target(partition, self._workload.optimizer(partition), streamer, file)
        complete = []
        for parts in self._slices[partition][group]:
            parameters = {}
            for part in parts:
                parameters[part.name] = part_of(residency.parameters[part.name], part, buffers.stored)
            streamer.write_all(partition, file, self._step(target, parts, parameters, gradients))
            for part in parts:
                if part.is_last:
                    whole = residency.parameters[part.name]
                    whole.grad = None
                    complete.append(Write(weight_key(part.name), whole))
            if self._device.shares_host:
                # At once: what is written may go.
                streamer.write_all(partition, file, complete)
                complete = []
        streamer.write_all(partition, file, complete)

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
            if name in buffers.stored.names:
                if parameter.grad is not None:  # of a forward that reads the weight itself
                    buffers.stored.put_rows(name, parameter.shape, torch.arange(len(parameter)), parameter.grad)
                    parameter.grad = None
                gradients.norms[name] = buffers.stored.norm(name, self._device.buffer_sizes.slice_elements)
                self._look_at(name, gradients.norms[name], partition, gradients)
                continue
            if parameter.grad is None:
                continue  # which the batch went past
            for total in unscaled_sums([parameter.grad], gradients.scale):
                self._look_at(name, total, partition, gradients)
            rounds = self._workload.optimizer(partition).rounds(parameter)
            # Otherwise by the kernel that `clip_grad_norm_` takes, which is another one on a GPU; of one norm its norm is itself.
            gradients.norms[name] = (
                torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
                if rounds
                else nn.utils.get_total_norm([parameter.grad])
            )
            if not gradients.scale.moves:
                self._look_at(name, gradients.norms[name], partition, gradients)
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
        self.read_gradients(gradients)
        clip_norm = self._workload.config.clip_norm
        if gradients.total_norm is None:
            # The norm of the norms, as `clip_grad_norm_` has it.
            norms = [norm for _, norm in sorted(gradients.norms.items(), key=lambda item: self._rank[item[0]])]
            gradients.total_norm = nn.utils.get_total_norm(norms)
        groups = self._residencies[partition].groups
        target = _Target(partition, self._workload.optimizer(partition), streamer, file)
        for parts in (
            parts for group in step_order(groups, self.after_backward[partition]) for parts in self._slices[partition][group]
        ):
            parameters = {}
            for part in parts:
                elements = None if part.is_whole else part.elements
                value = streamer.take()
                if part.name in self._workload.chain.written:
                    # The file has what was there before the forward.
                    value = buffers.pop_written(part.name, elements)
                parameters[part.name] = nn.Parameter(value)
                if part.name in gradients.norms:
                    parameters[part.name].grad = buffers.pop_parameter_gradient(part.name, elements)
            if clip_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters.values(), clip_norm, gradients.total_norm)
            writes = self._step(target, parts, parameters, gradients)
            for part in parts:
                writes.append(Write(weight_key(part.name), parameters[part.name], None if part.is_whole else part.begin))
            streamer.write_all(partition, file, writes)

    def _step(
        self, target: "_Target", parts: Sequence[StepSlice], parameters: dict[str, nn.Parameter], gradients: Gradients
    ) -> list[Write]:
        """Step parameters, or a slice of one, and free the gradients; return what is to be written of their state."""
        partition, spec = target.partition, target.spec
        shapes = self._shapes[partition]
        take = None if gradients.fresh_state else target.streamer.take
        state = {part.name: target.load_state(part, shapes[part.name], self._device, take) for part in parts}
        # Without a step, too, everything is written: the file may be a new one, without any values.
        if not gradients.overflowed:
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    self._look_at(name, parameter.grad.sum(), partition, gradients)
            step_parameters(
                spec,
                parameters,
                state,
                lambda base: self._workload.learning_rate(partition, gradients.step, self._total_steps, base=base),
                target.sliced,
            )
        for parameter in parameters.values():
            parameter.grad = None
        return [one for part in parts for one in target.state_writes(part, shapes[part.name], state[part.name])]

    def _look_at(self, name: str, value: Tensor, partition: int, gradients: Gradients) -> None:
        """Look at a gradient by its sum or its norm: before it gets into the weights, or, on another device, before they are committed.

        There the host would wait in the midst of a backward, for every parameter.
        """
        gradients.unread.append((partition, name, value))
        if self._device.shares_host:
            self.read_gradients(gradients)

    def read_gradients(self, gradients: Gradients) -> None:
        """Look at the gradients that are still on the device; the host waits for them once.

        Args:
            gradients: what is known of the batch's gradients.

        Raises:
            DivergedError: a gradient is not finite, where the loss scale is not adjusted.
        """
        unread, gradients.unread = gradients.unread, []
        if all_finite([value for _, _, value in unread]):
            return
        if gradients.scale.moves:
            gradients.overflowed = True
            return
        for partition, name, value in unread:
            if all_finite([value]):
                continue
            title = self._plan.title(partition, [layer.name for layer in self._workload.chain.layers])
            raise DivergedError(
                f"the gradient of {name!r} is no longer finite in {title}, step {gradients.step + 1}; "
                "the last commit is kept; try a lower --lr"
            )


@dataclass
class _Target:
    """What is known of the steps of one partition: where state comes from and goes to, and how far a sliced parameter is.

    Args:
        partition: number of the partition.
        spec: its optimizer.
        streamer: source and target of the state.
        file: open working file of the partition.
        sliced: the parameter that is stepped slice by slice at present.
        count: its count of steps, before the step.
    """

    partition: int
    spec: OptimizerSpec
    streamer: WeightStreamer
    file: TensorFile
    sliced: SlicedParameter | None = None
    count: Tensor | None = None

    def load_state(
        self, part: StepSlice, parameter: Tensor, device: Device, take: Callable[[], Tensor] | None
    ) -> dict[str, Tensor]:
        """Load the state of a slice onto the device.

        Args:
            part: slice of a parameter; the slices of a parameter come in order.
            parameter: the whole parameter; only its type and shape are read.
            device: training device.
            take: function that returns the tensors of `state_pieces` on the device, one after the other; None before the first step.
        """

        def load(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
            if take is None:
                return torch.zeros(shape, dtype=dtype, device=device.torch_device)
            tensor = take()
            assert tensor.shape == shape, "state is taken in the order in which it is read"  # a fused step would not ask
            return tensor

        layout = self.spec.layout(parameter)
        if part.is_whole:
            self.sliced = None
            return {name: load(*layout[name]) for name in layout}
        state = {}
        for name, elements in state_elements(self.spec, parameter, part).items():
            if elements is not None:
                state[name] = load(layout[name][0], (elements.stop - elements.start,))
            elif part.begin == 0:
                self.count = load(*layout[name])
        if part.begin == 0:
            self.sliced = SlicedParameter(parameter)
        if self.count is not None and COUNT in layout:
            state[COUNT] = self.count.clone()  # each slice increments it
        return state

    def state_writes(self, part: StepSlice, parameter: Tensor, state: Mapping[str, Tensor]) -> Iterator[Write]:
        """Yield what is to be written of the state of a slice.

        Args:
            part: slice of a parameter.
            parameter: the whole parameter; only its type and shape are read.
            state: state of the slice, as `load_state` returned it, after the step.
        """
        if part.is_whole:
            for name, tensor in state.items():
                yield Write(state_key(part.name, name), tensor)
            return
        for name, elements in state_elements(self.spec, parameter, part).items():
            if elements is not None:
                yield Write(state_key(part.name, name), state[name], elements.start)
            elif part.is_last:
                yield Write(state_key(part.name, name), state[name])


def state_pieces(spec: OptimizerSpec, parameter: Tensor, part: StepSlice, pack: Hashable = None) -> Iterator[Piece]:
    """Yield the pieces of a weight file that hold the optimizer state of a slice.

    Args:
        spec: optimizer.
        parameter: the whole parameter; only its type and shape are read.
        part: slice of the parameter.
        pack: pack of the pieces.
    """
    for name, elements in state_elements(spec, parameter, part).items():
        if part.is_whole or elements is not None or part.begin == 0:
            yield Piece(state_key(part.name, name), None if part.is_whole else elements, pack)


def step_parameters(
    spec: OptimizerSpec,
    parameters: Mapping[str, nn.Parameter],
    state: Mapping[str, Mapping[str, Tensor]],
    rate_of: Callable[[float | None], float],
    sliced: SlicedParameter | None = None,
) -> None:
    """Step the parameters that have a gradient.

    Args:
        spec: optimizer.
        parameters: parameters by name, on the device.
        state: optimizer state by parameter and name, on the device; changed in place.
        rate_of: returns the learning rate of this step, of parameters with a rate of their own, or of the others (None).
        sliced: the parameter of which the only one of `parameters` is a slice; None where they are whole.
    """
    optimizer = spec.build(parameters, state, sliced)
    for group in optimizer.param_groups:
        group["lr"] = rate_of(group.get("rate"))
    optimizer.step()
