"""PlanRequest: a workload, the memory costs of its layers, and the device that a plan has to fit."""

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property

from lowmem_pnn.device import Device
from lowmem_pnn.engine.gradient_tiles import tiled_bytes
from lowmem_pnn.model.layer import Layer, gradients_complete_at_once, is_rowwise
from lowmem_pnn.optim.step_slices import largest_state_bytes
from lowmem_pnn.planning.search import GOOD_MICRO_BATCH
from lowmem_pnn.profiling.costs import (
    Affine,
    LayerCost,
    MemoryProfile,
    with_chunked_loss,
    with_row_gradients,
    with_step_in_backward,
    with_streamed_state,
    with_vocabulary_tiles,
)
from lowmem_pnn.sweep.vocabulary import Vocabulary, tile_rows, vocabulary_of
from lowmem_pnn.sweep.vocabulary_tiles import work_bytes
from lowmem_pnn.workload import Workload

_FLOAT_BYTES = 4
# Rows of a micro-batch above which gradients are accumulated seldom enough, where a sample has several rows (tokens).
_GOOD_ROWS = 512


@dataclass(frozen=True)
class PlanRequest:
    """Request for a plan: everything that a plan, its footprint and its forecast are computed from.

    Args:
        workload: Model, data and method.
        profile: Memory costs of the layers, as they were measured.
        device: Device, open; the plan has to fit its budget.
        unexplained_bytes: Bytes that a measurement showed above the prediction of an earlier plan; they are kept free too.
        mixes_samples: Whether modules of the user's own mix the samples of a batch, as BatchNorm does.
        tail: Memory of the largest tail of thin parts that a partition's loss goes through, the loss included.
        free_disk_bytes: Bytes that are free where the run's folder is to be, which the journal's plan does not depend on any more; None where
            nobody has looked.
        by_vocabulary: Whether gradients of wide embeddings, and of a wide last layer, are made in pieces: where no plan fits otherwise.
    """

    workload: Workload
    profile: MemoryProfile
    device: Device
    unexplained_bytes: int = 0
    mixes_samples: bool = False
    tail: Affine = field(default_factory=lambda: Affine(0, 0))
    free_disk_bytes: int | None = None
    by_vocabulary: bool = False

    @property
    def num_layers(self) -> int:
        """Number of layers in the chain."""
        return len(self.profile.layers)

    @property
    def cuts(self) -> list[int] | None:
        """Layers at which `--cuts` cuts the chain; None where the planner cuts it."""
        config = self.workload.config
        return None if config.cuts is None else [self.workload.chain.layer_index(cut) for cut in config.cuts]

    @property
    def is_one_partition(self) -> bool:
        """Whether the model is one partition, whatever the budget: none of its outputs are written."""
        return self.workload.method.num_partitions == 1 or self.cuts == [] or self.num_layers == 1

    @property
    def whole_batches(self) -> bool:
        """Whether a batch has to go through at once, since what mixes samples, or the loss, has to see all of it."""
        return self.workload.needs_whole_batch or (self.workload.config.batch_norm == "refuse" and self.depends_on_micro_batch)

    @property
    def depends_on_micro_batch(self) -> bool:
        """Whether what is trained depends on the micro-batch, since BatchNorm, or a module of the user's own, mixes the samples in it."""
        return self.mixes_samples or bool(self.workload.batch_norms())

    @property
    def good_micro_batch(self) -> int:
        """Samples that keep a device busy: a power of two; of tokens as many as make 512 rows."""
        rows = self.workload.rows_per_sample
        return GOOD_MICRO_BATCH if rows == 1 else 1 << max(0, (_GOOD_ROWS // rows).bit_length() - 1)

    @cached_property
    def loss_chunk(self) -> int | None:
        """Rows for which the last layer and the loss are computed at once; None for all rows of a micro-batch."""
        config, chain, rows_per_sample = self.workload.config, self.workload.chain, self.workload.rows_per_sample
        rows = max(config.batch_sizes) * rows_per_sample
        if config.loss_chunk is not None:
            return config.loss_chunk if config.loss_chunk < rows else None
        by_rows = self.workload.task.is_by_rows and is_rowwise(chain.layers[-1])
        if self.workload.method.learns_per_layer or not by_rows:
            return None
        row_bytes = chain.boundaries[-1][0].sample_bytes // rows_per_sample
        if rows * row_bytes <= self.device.budget_bytes // 16:
            return None
        return max(1, self.device.budget_bytes // 64 // row_bytes)

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The wide weights whose gradients may be made in pieces; None where there are none, or the cuts that were asked for leave no way to."""
        config = self.workload.config
        if not self.device.shares_host or config.batch_size == "auto":
            return None
        found, last = vocabulary_of(self.workload), self.num_layers - 1
        cuts = self.cuts
        has_way = config.partitions is None and (cuts is None or last in cuts) and last not in self.profile.forbidden_cuts
        if found is not None and found.head is not None and not has_way:
            return None  # the last layer is a partition by itself
        return found

    @cached_property
    def in_pieces(self) -> "PlanRequest | None":
        """The request for a plan by which gradients of wide weights are made in pieces; None where there is no other way, or it is asked for."""
        return None if self.by_vocabulary or self.vocabulary is None else dataclasses.replace(self, by_vocabulary=True)

    @cached_property
    def vocabulary_tile(self) -> int | None:
        """See `Plan.vocabulary_tile`."""
        if not self.by_vocabulary or self.vocabulary is None:
            return None
        if self.vocabulary.head is None:
            return 0
        return tile_rows(self.device.budget_bytes, self._rows, self.workload.chain.boundaries[-2][0].shape[-1])

    @property
    def _rows(self) -> int:
        """Rows of scores of a batch."""
        return max(self.workload.config.batch_sizes) * self.workload.rows_per_sample

    @cached_property
    def costs(self) -> MemoryProfile:
        """Memory costs of the layers as the method runs them."""
        return self._costs(sweeps=self.workload.method.sweeps)

    @cached_property
    def sweep_costs(self) -> MemoryProfile:
        """Memory costs of the layers as a sweep runs them."""
        return self._costs(sweeps=True)

    def _costs(self, *, sweeps: bool) -> MemoryProfile:
        layers = list(self.profile.layers)
        if self.loss_chunk is not None:
            tiled = tiled_bytes(self.workload.chain.layers[-1])
            layers[-1] = with_chunked_loss(layers[-1], self.loss_chunk / self.workload.rows_per_sample, tiled)
        # Steps that wait for all gradients: a sweep keeps the gradients outside of memory, other visits keep them in memory.
        if self.workload.config.step_in_backward and (sweeps or not self.workload.config.steps_wait):
            complete = gradients_complete_at_once(self.workload.chain.layers, in_chunks=self.loss_chunk is not None)
            layers = [with_step_in_backward(layer) if at_once else layer for layer, at_once in zip(layers, complete, strict=True)]
        if sweeps:
            layers = [
                with_streamed_state(cost, *self._slice_bytes(layer))
                for cost, layer in zip(layers, self.workload.chain.layers, strict=True)
            ]
        if self.vocabulary_tile is not None:
            layers = [self._in_pieces(number, cost) for number, cost in enumerate(layers)]
        return dataclasses.replace(self.profile, layers=tuple(layers))

    def _in_pieces(self, number: int, cost: LayerCost) -> LayerCost:
        """Return the cost of a layer whose wide weights get their gradients in pieces."""
        vocabulary, chain = self.vocabulary, self.workload.chain
        assert vocabulary is not None, "there are such weights"
        slice_bytes = _FLOAT_BYTES * self.device.buffer_sizes.slice_elements
        weights = {chain.owner_of(alias): one for alias, one in chain.layers[number].parameters().items()}
        if names := sorted(vocabulary.of_layer(number)):
            row_bytes = sum(weights[name].nbytes // len(weights[name]) for name in names)
            # Numbers of rows come in, or are made inside, as those of positions: one for each row of the outputs then.
            inputs = [math.prod(spec.shape) for spec in chain.boundaries[number] if not spec.dtype.is_floating_point]
            outputs = (
                [math.prod(spec.shape[:-1]) for spec in chain.boundaries[number + 1]] if number + 1 < self.num_layers else []
            )
            tokens = max([*inputs, *outputs], default=1)
            batch = max(self.workload.config.batch_sizes)
            rows = Affine(0, tokens * row_bytes)
            return with_row_gradients(cost, [weights[name].nbytes for name in names], rows, batch, slice_bytes)
        if number == self.num_layers - 1 and self.vocabulary_tile and vocabulary.head is not None:
            weight, features = weights[vocabulary.head], chain.boundaries[-2][0].shape[-1]
            work = 2 * self._rows * features * _FLOAT_BYTES + work_bytes(self._rows, features, self.vocabulary_tile)
            return with_vocabulary_tiles(cost, weight.nbytes, work, slice_bytes)
        return cost

    def _slice_bytes(self, layer: Layer) -> tuple[int, int]:
        """Return the most bytes of optimizer state that a sweep's step of a layer holds at one time, and of the step's own memory."""
        learning = {name: parameter for name, parameter in layer.parameters().items() if parameter.requires_grad}
        most = self.device.buffer_sizes.slice_elements
        optimizers = [self.workload.optimizer(number) for number in range(len(self.workload.config.optimizer))]
        state = max(largest_state_bytes(optimizer, learning, most) for optimizer in optimizers)
        steps = (
            optimizer.step_bytes(parameter, most, self.device.torch_device)
            for optimizer in optimizers
            for parameter in learning.values()
        )
        return state, max(steps, default=0)

    def objective_memory(self, stop: int, *, sweeps: bool = False) -> Affine:
        """Return the device memory of a partition's objective.

        Args:
            stop: Layer after the partition's last.
            sweeps: Whether the partition learns in a sweep, where only the last partition has an objective.
        """
        chain = self.workload.chain
        is_last = stop == self.num_layers
        if sweeps and not is_last:
            return Affine(0, 0)
        # The number of the partition does not matter to its memory, only whether it is the last.
        objective = self.workload.method.objective(0, 1 if is_last else 2, chain.laid_out[stop], self.workload.task)
        elements = [(math.prod(spec.shape), spec.dtype) for spec in chain.boundaries[stop]]
        memory = objective.memory(sum(number * max(_FLOAT_BYTES, dtype.itemsize) for number, dtype in elements))
        # Losses are computed in float32, whatever the precision of the layers.
        copies = sum(
            number * _FLOAT_BYTES for number, dtype in elements if dtype.is_floating_point and dtype.itemsize < _FLOAT_BYTES
        )
        memory = Affine(memory.fixed, memory.per_sample + copies)
        if not is_last and self.workload.method.incubates:
            return Affine(memory.fixed + self.tail.fixed, memory.per_sample + self.tail.per_sample)
        if self.loss_chunk is None or not is_last:
            return memory
        return Affine(memory.fixed + math.ceil(memory.per_sample * self.loss_chunk / self.workload.rows_per_sample), 0)
