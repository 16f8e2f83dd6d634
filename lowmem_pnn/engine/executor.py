"""The executor: trains and runs the active partition batch by batch, and undoes a batch that does not fit.

A batch is the transaction: nothing that outlives it changes before the optimizer's step, so running out of memory in it (or a meter
that shows more than the budget) is undone by dropping the gradients and restoring the buffers; then it is done again with half the
micro-batch. The batch that the optimizer sees stays the same, by gradient accumulation.

Where a batch goes through at once, layers step during its backward (`lowmem_pnn.engine.optimizer_in_backward`). Memory that runs out
after the first step cannot be undone here: `SteppedInPart` says so, and the last commit can be gone back to.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lowmem_pnn.device import Device, Download
from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.loaders import Loader
from lowmem_pnn.engine.micro_batches import micro_batches
from lowmem_pnn.engine.optimizer_in_backward import OptimizerInBackward
from lowmem_pnn.engine.optimizer_step import finish_step, layer_steps
from lowmem_pnn.engine.out_of_memory import SteppedInPart, fits, halved, too_large, unless_out_of_memory
from lowmem_pnn.engine.passes import backward_from_loss, outputs_in_chunks, scores_per_layer
from lowmem_pnn.engine.stalls import Stalls
from lowmem_pnn.engine.tally import Tally
from lowmem_pnn.engine.uploads import MicroBatch, Uploads
from lowmem_pnn.model.layer import python_state_of, set_python_state
from lowmem_pnn.seeds import seed_generators, seed_of
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.activations import Batch

_T = TypeVar("_T")


class Executor:
    """Trains and runs one active partition at a time.

    Args:
        device: open training device.
        seed: seed of the run.
        on_shrink: called with the active partition after its micro-batch was halved.
        stalls: counter of the time spent waiting.
    """

    def __init__(
        self,
        device: Device,
        seed: int,
        on_shrink: Callable[[ActivePartition], None] = lambda active: None,
        stalls: Stalls | None = None,
    ) -> None:
        self._stalls = stalls or Stalls()
        self._device = device
        self._seed = seed
        self._on_shrink = on_shrink
        self._uploads = Uploads(device)

    def prepare(self, active: ActivePartition) -> None:
        """Make what the partition's objective needs on the device.

        Raises:
            BudgetError: it does not fit.
        """
        if not fits(lambda: active.objective.prepare(self._device.torch_device)):
            raise too_large(self._device, f"for the objective of {active.title}")

    def over(self, loader: Loader, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Batch | None]]:
        """Iterate over batches, counting the time spent waiting for them, each with the one after it where that is there already.

        Args:
            loader: the source of the batches.
            batches: batches of the loader.
        """
        return self._uploads.with_following(self._stalls.iterate(loader.stall_kind, batches))

    def train_batch(self, active: ActivePartition, batch: Batch, step: int, following: Batch | None = None) -> float:
        """Take one optimizer step; do it again with smaller micro-batches until it fits.

        Args:
            active: the partition, in train mode.
            batch: boundary tensors (B, ...) and labels (B,), on the host.
            step: optimizer steps of the partition so far, which seed the batch's random choices.
            following: the batch after it, where it is there already.

        Returns:
            The batch's mean loss; no weight has moved where it is not finite.

        Raises:
            SteppedInPart: memory ran out after some of the weights were stepped.
            BudgetError: not even the smallest micro-batch fits.
            CaptureError: a parameter got no gradient.
        """
        residency = active.residency
        buffers = unless_out_of_memory(lambda: {name: tensor.clone() for name, tensor in residency.buffers.items()})
        if buffers is None:
            raise too_large(self._device, f"with a copy of {active.title}'s buffers")
        python_state = python_state_of(residency.layers)
        while True:
            parts = self._parts(active, batch)
            steps = layer_steps(active, step, one_micro_batch=len(parts) == 1)
            loss = unless_out_of_memory(partial(self._accumulate, active, batch, step, parts, steps, following))
            if loss is not None:
                break
            if steps.stepped or not residency.chain.written.isdisjoint(residency.parameters):
                # Or a forward may have written into them.
                raise SteppedInPart(str(too_large(self._device, f"in a batch of {active.title} that was stepped in part")))
            residency.copy_back_replaced_buffers()
            for name, tensor in residency.buffers.items():
                tensor.copy_(buffers[name])
            set_python_state(residency.layers, python_state)
            self.shrink(active)
        residency.copy_back_replaced_buffers()
        # A step that is not finite would poison the weights; the caller stops the run. In fp16 the gradients tell, and it is left out.
        if math.isfinite(loss) or active.loss_scale.moves:
            residency.check_gradients(active.title, steps.stepped)
            # One that runs out of memory cannot be done again: some weights may have moved.
            if not fits(lambda: finish_step(active, steps)):
                raise too_large(self._device, f"for the optimizer's step of {active.title}")
        active.drop_gradients()
        # What has been stepped stands, be it above the budget: the next batches are for smaller micro-batches.
        if steps.stepped and not fits(self._device.check_budget):
            self.shrink(active)
        return loss

    def measure(self, active: ActivePartition, loader: Loader) -> list[Tally]:
        """Measure loss and accuracy over samples, in eval mode.

        Args:
            active: the partition.
            loader: samples at its boundary.

        Returns:
            One tally for the partition's outputs; where layers learn by losses of their own, one for the scores of each layer.
        """
        per_layer_loss = active.objective.per_layer_loss
        tallies = [Tally() for _ in (active.residency.layers if per_layer_loss else (None,))]

        def count(outputs: tuple[Tensor, ...], labels: Tensor) -> Tally:
            return Tally.of(active.objective, outputs, labels, answers=per_layer_loss or active.is_last)

        def consume(counts: list[Tally]) -> None:
            for tally, counted in zip(tallies, counts, strict=True):
                tally.merge(counted)

        if per_layer_loss:
            layers = active.residency.layers
            self._forward(
                active,
                loader,
                lambda inputs, labels: [
                    [count((scores,), self._device.to_device(labels)) for scores in scores_per_layer(layers, inputs)]
                ],
                consume,
            )
        else:
            self.forward(active, loader, lambda outputs, labels: [count(outputs, self._device.to_device(labels))], consume)
        return tallies

    def emit(self, active: ActivePartition, loader: Loader, writer: ActivationWriter, on_micro_batch: Callable[[], None]) -> None:
        """Write the partition's outputs, in the loader's own order, in eval mode.

        Args:
            active: the partition.
            loader: samples at its boundary.
            writer: writer of the next boundary's store.
            on_micro_batch: called now and then; what it raises ends the writing.
        """

        def bring_down(outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[tuple[Download, ...], Tensor]:
            with self._stalls.waiting("copy"):  # for room
                return tuple(self._device.download(tensor) for tensor in outputs), labels

        def write(downloads: tuple[tuple[Download, ...], Tensor]) -> None:
            with self._stalls.waiting("copy"):
                tensors = tuple(download.get() for download in downloads[0])
            with self._stalls.waiting("disk"):
                writer.append(tensors, downloads[1])
            on_micro_batch()

        self.forward(active, loader, bring_down, write)

    def forward(
        self,
        active: ActivePartition,
        loader: Loader,
        work: Callable[[tuple[Tensor, ...], Tensor], _T],
        consume: Callable[[_T], None],
    ) -> None:
        """Run samples forward in eval mode, without gradients.

        Args:
            active: the partition.
            loader: samples at its boundary.
            work: what to do on the device with each micro-batch's outputs (of the last partition: chunk by chunk), on the device,
                and their labels, on the host; done again, with fewer samples, where it runs out of memory.
            consume: takes what `work` gave, once for every sample.
        """
        chunk_rows = active.chunk_rows if active.is_last else None
        layers = active.residency.layers
        self._forward(active, loader, lambda inputs, labels: outputs_in_chunks(layers, inputs, labels, chunk_rows, work), consume)

    def _forward(
        self,
        active: ActivePartition,
        loader: Loader,
        run: Callable[[tuple[Tensor, ...], Tensor], list[_T]],
        consume: Callable[[_T], None],
    ) -> None:
        """Send samples through a partition in eval mode; `run` takes a micro-batch on the device, and its labels on the host."""
        active.eval()
        # Where copies go on beside the computing, what comes of a micro-batch is consumed while the next one is computed.
        results: deque[_T] = deque()
        at_once = active.samples_at_once
        if active.micro_batch < at_once < active.batch_size:
            at_once -= at_once % active.micro_batch  # or each reading would end with fewer samples
        batches = self._stalls.iterate(loader.stall_kind, loader.batches(at_once, shuffle=False))
        for batch, following in self._uploads.with_following(batches):
            begin, total = 0, len(batch[1])
            while begin < total:
                part = slice(begin, begin + active.micro_batch)
                after = MicroBatch.of(batch, slice(part.stop, part.stop + active.micro_batch)) if part.stop < total else None
                if after is None and following is not None:
                    after = MicroBatch.of(following, slice(0, active.micro_batch))
                python_state = python_state_of(active.residency.layers)
                result = unless_out_of_memory(partial(self._run_eval, MicroBatch.of(batch, part), batch[1][part], after, run))
                del after
                self._consume(results, consume)
                if result is None:
                    set_python_state(active.residency.layers, python_state)
                    self.shrink(active)
                    continue
                results.extend(result)
                del result
                if self._device.shares_host:
                    self._consume(results, consume)
                begin = part.stop
            del batch, following  # the loader gives the next before these names are bound to it
        self._consume(results, consume)

    @staticmethod
    def _consume(results: deque[_T], consume: Callable[[_T], None]) -> None:
        while results:
            consume(results.popleft())

    def _run_eval(
        self,
        micro_batch: MicroBatch,
        labels: Tensor,
        after: MicroBatch | None,
        run: Callable[[tuple[Tensor, ...], Tensor], list[_T]],
    ) -> list[_T]:
        with self._stalls.waiting("copy"):
            inputs = self._uploads.take(micro_batch, after)
        with torch.no_grad():
            result = run(inputs, labels)
        self._device.check_budget()
        return result

    def _accumulate(
        self,
        active: ActivePartition,
        batch: Batch,
        step: int,
        parts: Sequence[slice],
        steps: OptimizerInBackward,
        following: Batch | None,
    ) -> float:
        """Run a batch's micro-batches forward and backward, in ascending order; each loss is weighted by its share of the batch."""
        loss_sum, shares = 0.0, active.objective.shares(batch[1], parts)
        chunk_rows = active.chunk_rows if active.is_last else None
        own = [MicroBatch.of(batch, part, with_labels=True) for part in parts]
        after = None if following is None else MicroBatch.of(following, self._parts(active, following)[0], with_labels=True)
        for number in range(len(parts)):
            seed_generators(seed_of(self._seed, "forward", active.number, step, number))
            with self._stalls.waiting("copy"):
                *inputs, targets = self._uploads.take(own[number], own[number + 1] if number + 1 < len(own) else after)
            with steps:
                loss_sum += backward_from_loss(
                    active.residency.layers,
                    tuple(inputs),
                    targets,
                    active.objective,
                    shares[number],
                    chunk_rows,
                    active.loss_scale,
                )
            del inputs
            if not steps.stepped:
                self._device.check_budget()
        return loss_sum

    @staticmethod
    def _parts(active: ActivePartition, batch: Batch) -> Sequence[slice]:
        return micro_batches(len(batch[1]), active.micro_batch, active.smallest_micro_batch)

    def shrink(self, active: ActivePartition) -> None:
        """Give memory back, and go on with half the micro-batch.

        Raises:
            BudgetError: it is the smallest already.
        """
        active.drop_gradients()
        self._uploads.drop()
        self._device.finish_transfers()
        self._device.release()
        half = halved(active.micro_batch, active.smallest_micro_batch) if active.may_shrink else None
        if half is None:
            raise too_large(self._device, f"for {active.title} with a micro-batch of {active.micro_batch}, the smallest")
        active.micro_batch = half
        self._on_shrink(active)
        self._device.begin_section()
