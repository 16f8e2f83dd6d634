"""Footprint: the device memory that a run needs beside its partitions' own state and activations."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.device.kernel_memory import packing_bytes
from lowmem_pnn.planning.disk_footprint import activation_bytes, num_evaluated_samples
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.profiling.costs import ties_counted_once
from lowmem_pnn.samples.epochs import all_samples, epochs_of
from lowmem_pnn.stores.encoding import WORK_BYTES

# Python objects of a module, and of an operation that is no module's. Measured: 5 MB for ResNet-18 (116 of them), 10 for MobileNetV2
# (318), 40 for DenseNet-121 (1,299).
_STRUCTURE_BYTES = 30_000
# Bytes of a sample's position in the data order; making an epoch's order takes as many for each sample.
_ORDER_BYTES = 24
_LABEL_BYTES = 8


@dataclass(frozen=True)
class Footprint:
    """Device memory beside the partitions, under a budget. Where host and device are one, host buffers count too.

    Args:
        request: Request that a plan is made for.
        budget_bytes: Budget from which the sizes of the buffers follow.
    """

    request: PlanRequest
    budget_bytes: int

    @classmethod
    def of(cls, request: PlanRequest) -> "Footprint":
        """Return the footprint under the budget of the request's own device."""
        return cls(request, request.device.budget_bytes)

    @cached_property
    def buffer_sizes(self) -> BufferSizes:
        """Sizes of the buffers between disk, host and device."""
        return BufferSizes.of_budget(self.budget_bytes)

    @property
    def overhead_bytes(self) -> int:
        """Bytes of the budget that are kept free beside every partition, and beside its samples and streams (`beside_bytes`)."""
        waiting = self.waiting_bytes() if self.request.workload.method.sweeps else 0
        shards = self.shard_bytes(self.request.num_layers) if self.writes_shards else 0
        return self.request.device.reserve_for(self.budget_bytes) + self.constant_bytes + waiting + shards

    @property
    def constant_bytes(self) -> int:
        """Bytes in use during every visit: context, kernels, unexplained bytes, the structure of the model, and the allocator's slack."""
        return self.constant_bytes_beside(None)

    def constant_bytes_beside(self, heap_bytes: int | None) -> int:
        """Return `constant_bytes` where no more than so many bytes come from the heap, whose slack is then smaller."""
        request = self.request
        constant = request.device.fixed_bytes + self._kernel_bytes + request.unexplained_bytes
        if request.device.shares_host:
            constant += packing_bytes(request.profile.widest_product, torch.get_num_threads())
            constant += request.workload.chain.num_objects * _STRUCTURE_BYTES
        return constant + request.device.slack_for(self.budget_bytes, heap_bytes)

    @property
    def _kernel_bytes(self) -> int:
        """Bytes of the kernels that are compiled and kept: anew for each number of samples that layers run on."""
        request = self.request
        workload, profile = request.workload, request.profile
        batch_size = workload.config.batch_size
        # An epoch's last batch has fewer samples where they do not divide.
        divides = batch_size != "auto" and all(
            len(workload.splits["train"]) % batch == 0 for batch in workload.config.batch_sizes
        )
        kernels = profile.kernel_bytes * (1 if divides else 2)
        # Outside of sweeps partitions write their outputs in eval mode, in micro-batches of another size.
        return kernels + (profile.emit_kernel_bytes if self._evaluates or not workload.method.sweeps else 0)

    @property
    def writes_shards(self) -> bool:
        """Whether partitions write their outputs in shards, which are in device memory: sweeps do so for measures and fixed layers alone."""
        workload = self.request.workload
        if not self.request.device.shares_host or self.request.is_one_partition:
            return False
        return not workload.method.sweeps or self._evaluates or workload.fixed_layers > 0

    def shard_bytes(self, boundary: int) -> int:
        """Return the bytes of two shards, as many as are in memory while a boundary is written: each has at least one sample.

        Args:
            boundary: Boundary that is written; behind the last layer, where nothing is written, for shards of their usual size.
        """
        sample = activation_bytes(self.request.workload, boundary) if boundary < self.request.num_layers else 0
        return 2 * max(self.buffer_sizes.shard_bytes, sample)

    def wide_shard_bytes(self, boundary: int) -> int:
        """Return what shards of wide samples take above two usual ones and the gradient of a sample, which is not there while they are written.

        Args:
            boundary: Boundary that is written.
        """
        return max(0, self.shard_bytes(boundary) // 2 - 2 * self.buffer_sizes.shard_bytes) if self.writes_shards else 0

    @property
    def _evaluates(self) -> bool:
        """Whether anything is measured outside of training."""
        return not self.request.workload.splits.keys().isdisjoint(("val", "test"))

    def beside_bytes(self, boundary: int, batch: int, cuts: Sequence[int] | None = None) -> int:
        """Return the bytes of samples and streams beside a partition while it trains.

        Args:
            boundary: Boundary before the partition, where its samples come from: 0 is the data set.
            batch: Samples of an optimizer step.
            cuts: Layers that start a partition; None where they are not known yet.
        """
        if not self.request.workload.method.sweeps:
            return self.reading_bytes(boundary, batch)
        # In an evaluation a sweep's partitions read their samples from shards.
        reading = self.reading_bytes(boundary, batch, learns=False) if self._evaluates else 0
        return max(reading, self.sweep_bytes(batch, cuts))

    def sweep_bytes(self, batch: int, cuts: Sequence[int] | None = None) -> int:
        """Return the bytes beside a partition in a sweep: batches of the data set, prefetched weights and state, boundary activations.

        Args:
            batch: Samples of an optimizer step.
            cuts: Layers that start a partition; None where they are not known yet.
        """
        if not self.request.device.shares_host:
            return self.buffer_sizes.transfer_bytes
        reading = max(self.reading_bytes(0, batch), self._stored_batches_bytes(batch))
        prefetched = self.stream_bytes(self.buffer_sizes.stream_bytes)
        return reading + prefetched + self._boundary_bytes(batch, cuts)

    def _stored_batches_bytes(self, batch: int) -> int:
        """Return the bytes of two batches of what frozen layers have written once, and of the order in which they come."""
        workload = self.request.workload
        if not workload.fixed_layers:
            return 0
        sample = sum(spec.sample_bytes for spec in workload.chain.boundaries[workload.fixed_layers])
        return 2 * batch * (sample + _LABEL_BYTES * workload.rows_per_sample) + 2 * _ORDER_BYTES * len(workload.splits["train"])

    def waiting_bytes(self, window_bytes: int | None = None) -> int:
        """Return the bytes that may wait to be written in a sweep; no prediction counts them, for the drive mostly keeps up.

        Args:
            window_bytes: Bytes of the stream's window; None for that of the budget.
        """
        return self.stream_bytes(window_bytes or self.buffer_sizes.stream_bytes) if self.request.device.shares_host else 0

    def _boundary_bytes(self, batch: int, cuts: Sequence[int] | None) -> int:
        """Return the bytes of a batch at the boundaries, as far as they are kept in memory: without cuts, as if every layer began one."""
        boundaries = self.request.workload.chain.boundaries
        numbers = range(1, self.request.num_layers) if cuts is None else cuts
        sizes = [batch * sum(spec.sample_bytes for spec in boundaries[number]) for number in numbers]
        # And the gradients at one of them, and those of weights that wait for others.
        return min(self.buffer_sizes.boundary_bytes, sum(sizes) + max(sizes, default=0) + self._waiting_gradient_bytes(batch))

    def _waiting_gradient_bytes(self, batch: int) -> int:
        """Return the most bytes of gradients that a sweep keeps beside its boundaries: before a step that waits, and of shared weights."""
        most = self.buffer_sizes.boundary_bytes  # larger ones go to disk, whatever is in memory
        shared = [tie.gradient_bytes for layer in self.request.profile.layers for tie in layer.ties if not tie.is_first]
        waiting = batch * sum(size for size in shared if size <= most)
        if self.request.workload.config.steps_wait:
            parameters = {parameter for layer in self.request.workload.chain.layers for parameter in layer.parameters().values()}
            waiting += sum(one.nbytes for one in parameters if one.requires_grad and one.nbytes <= most)
        if self.request.vocabulary_tile is not None:
            # The rows of an embedding, until it steps: as much as a batch of what comes out of it.
            waiting += batch * max(layer.output_bytes.per_sample for layer in self.request.profile.layers[:-1])
        return waiting

    def stream_bytes(self, window_bytes: int) -> int:
        """Return the bytes that a sweep prefetches, and as many that it writes behind: at most all that it moves.

        Args:
            window_bytes: Bytes of the stream's window; a tensor that is larger is read into its place, and written in parts.
        """
        return min(window_bytes, self.streamed_bytes)

    @cached_property
    def streamed_bytes(self) -> int:
        """Bytes of all weights, buffers and optimizer state, which a sweep moves as far as they do not stay in memory."""
        layers = ties_counted_once(self.request.profile.layers)
        return sum(layer.weight_bytes + layer.buffer_bytes + layer.optimizer_bytes for layer in layers)

    @cached_property
    def largest_tensor_bytes(self) -> int:
        """Bytes of the model's largest tensor."""
        layers = self.request.workload.chain.layers
        return max(tensor.nbytes for layer in layers for tensor in (*layer.parameters().values(), *layer.buffers().values()))

    def reading_bytes(self, boundary: int, batch: int, *, learns: bool = True) -> int:
        """Return the bytes of samples while they are read; where the host is not the device, while they are copied.

        Args:
            boundary: Boundary where the samples are read: 0 is the data set.
            batch: Samples of an optimizer step.
            learns: Whether the samples are learnt from, or only sent forward.
        """
        workload, buffers = self.request.workload, self.buffer_sizes
        if not self.request.device.shares_host:
            return buffers.transfer_bytes
        label_and_order = workload.task.training_targets.sample_bytes + _ORDER_BYTES
        specs = workload.chain.boundaries[boundary]
        sample = sum(spec.sample_bytes for spec in specs) + label_and_order
        smallest = batch if learns or self.request.whole_batches else self.request.profile.smallest_micro_batch
        at_once = buffers.samples_at_once(boundary, self.request.profile.layers[boundary].input_bytes.per_sample, batch, smallest)
        # Of the data set a batch is read ahead; a stored one is put together when its turn comes. One more while its samples are mixed.
        number = (2 if boundary == 0 else 1) + (workload.mixer is not None and learns)
        batches = number * at_once * sample
        if workload.config.activation_dtype != "float32":
            batches += WORK_BYTES
        if boundary == 0:
            # And the epoch's order while it is made, and an image while it is decoded, where no other process does that.
            batches += 0 if workload.config.workers else workload.dataset.decoding_bytes
            epochs = epochs_of(workload.splits["train"])
            drawing = 0 if epochs is None else epochs.drawing_bytes
            return batches + drawing + _ORDER_BYTES * max(map(all_samples, workload.splits.values()))
        if workload.method.partitions_are_independent:
            class_vectors = workload.method.objective(0, 2, specs, workload.task).memory(0).fixed
            # Labels, and the epoch's order while it is made.
            return batches + class_vectors + (_LABEL_BYTES + _ORDER_BYTES) * all_samples(workload.splits["train"])
        # The validation set's window is open while the training set's stays in memory for the next epoch. A window has at least a sample.
        stored = activation_bytes(workload, boundary) + label_and_order
        window, small_window = max(buffers.window_bytes, stored), max(buffers.window_bytes // 2, stored)
        train = min(window, len(workload.splits["train"]) * stored)
        val = min(small_window, len(workload.splits["val"]) * stored) if "val" in workload.splits else 0
        # An evaluation reads samples at full precision, even where training reads encoded ones.
        small_window = max(small_window, sample)
        evaluated = min(small_window, num_evaluated_samples(workload) * sample) if stored < sample else 0
        return batches + max(train + val, evaluated)
