"""The executor: runs one visit inside a residency, batch by batch, and undoes a batch that does not fit.

A batch is the transaction: nothing that outlives it changes before the optimizer's step, so running out of memory in it (or a meter
that shows more than the budget) is undone by dropping the gradients and restoring the buffers; then it is done again with half the
micro-batch. The batch that the optimizer sees stays the same, by accumulation.

Where a batch goes through at once, layers step during its backward (`lowmem_pnn.arrivals`). Memory that runs out after the first step
cannot be undone here: `SteppedInPart` says so, and the last commit can be gone back to.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowmem_pnn.arrivals import Arrivals, late_names
from lowmem_pnn.device import Device, is_out_of_memory
from lowmem_pnn.errors import BudgetError, DataError, DivergedError
from lowmem_pnn.feeds import Batch, Feed
from lowmem_pnn.numerics import unscale
from lowmem_pnn.passes import backward_from_loss, micro_batches, outputs_in_chunks, place_aligned, scores_by_units
from lowmem_pnn.seeds import seed_of
from lowmem_pnn.stage import Progress, Stage, Tally
from lowmem_pnn.stalls import Stalls
from lowmem_pnn.stores.activations import ActivationWriter
from lowmem_pnn.units import format_bytes

_T = TypeVar("_T")


class SteppedInPart(BudgetError):
    """Memory ran out in a batch when some of the weights had been stepped: they are no state that training can go on from."""


class Executor:
    """Runs visits.

    Args:
        device: open.
        seed: of the run.
        on_shrink: called after a micro-batch was halved, with the stage.
        stalls: where waiting is noted.
    """

    def __init__(
        self,
        device: Device,
        seed: int,
        on_shrink: Callable[[Stage], None] = lambda stage: None,
        stalls: Stalls | None = None,
    ) -> None:
        self._stalls = stalls or Stalls()
        self._device = device
        self._seed = seed
        self._on_shrink = on_shrink

    def prepare(self, stage: Stage) -> None:
        """Make what the stage's objective needs on the device.

        Raises:
            BudgetError: it does not fit.
        """
        if not self._fits(lambda: stage.objective.prepare(self._device.torch_device)):
            raise self._too_large(stage, f"for the objective of {stage.title}")

    def learn_epoch(
        self,
        stage: Stage,
        feed: Feed,
        progress: Progress,
        on_batch: Callable[[float | None], None],
        *,
        epochs_before: int = 0,
        steps_before: int = 0,
    ) -> None:
        """Train over one epoch's samples, from where `progress` says.

        Args:
            stage: the partition.
            feed: its training samples.
            progress: moved on after every batch; at the epoch's end `batch` is 0 and `epoch` one more.
            on_batch: called after every batch with its loss (None if it was left out as too small), when `progress`, weights and
                optimizer state belong together.
            epochs_before: of the partition's earlier visits; with those of `progress` they say which epoch this is.
            steps_before: optimizer steps of them.

        Raises:
            DivergedError: the loss became NaN or infinite.
            BudgetError: not even the smallest micro-batch fits.
            CaptureError: a parameter got no gradient.
            DataError: there are fewer samples than the modules need at once.
        """
        steps = math.ceil(feed.num_samples / stage.batch_size)
        for layer in stage.residency.layers:
            layer.module.train()
        epoch = epochs_before + progress.epoch
        batches = feed.batches(stage.batch_size, shuffle=stage.shuffle, epoch=epoch, start=progress.batch, drawn=("epoch", epoch))
        for batch in self._stalls.over(feed.waits_for, batches):
            loss = None
            if len(batch[1]) >= stage.smallest_micro_batch:  # a last batch of 1 tells BatchNorm nothing
                step = steps_before + progress.epoch * steps + progress.batch
                loss = self.train_batch(stage, batch, step)
                if not math.isfinite(loss):
                    raise DivergedError(
                        f"the loss became {loss} in {stage.title}, epoch {progress.epoch + 1}, batch {progress.batch + 1}; "
                        f"the last commit is kept; {stage.loss_scale.remedy}"
                    )
                progress.tally.add(loss, len(batch[1]))
            progress.batch += 1
            del batch
            on_batch(loss)
        if not progress.tally.num_samples:
            raise too_few(feed.num_samples, stage.title, stage.smallest_micro_batch)
        progress.epoch += 1
        progress.batch = 0

    def train_batch(self, stage: Stage, batch: Batch, step: int) -> float:
        """One optimizer step; done again with smaller micro-batches until it fits.

        Args:
            stage: the partition.
            batch: boundary tensors (B, ...) and labels (B,), on the host.
            step: the partition's steps so far, which seeds the batch's random choices.

        Returns:
            The batch's mean loss.

        Raises:
            SteppedInPart: memory ran out after some of the weights were stepped.
            BudgetError: not even the smallest micro-batch fits.
            CaptureError: a parameter got no gradient.
        """
        buffers = self._unless_full(lambda: {name: tensor.clone() for name, tensor in stage.residency.buffers.items()})
        if buffers is None:
            raise self._too_large(stage, f"with a copy of {stage.title}'s buffers")
        while True:
            parts = micro_batches(len(batch[1]), stage.micro_batch, stage.smallest_micro_batch)
            steps = self._steps(stage, step, at_once=len(parts) == 1)
            loss = self._unless_full(lambda: self._accumulate(stage, batch, step, parts, steps))  # noqa: B023 - called at once
            if loss is not None:
                break
            if steps.taken:
                raise SteppedInPart(str(self._too_large(stage, f"in a batch of {stage.title} that was stepped in part")))
            stage.residency.settle_buffers()
            for name, tensor in stage.residency.buffers.items():
                tensor.copy_(buffers[name])
            self._shrink(stage)
        stage.residency.settle_buffers()
        # A step that is not finite would poison the weights; the caller stops the run.
        if math.isfinite(loss):
            stage.residency.check_gradients(stage.title, steps.taken)
            # One that runs out of memory cannot be done again: some weights may have moved.
            if not self._fits(lambda: self._finish(stage, steps)):
                raise self._too_large(stage, f"for the optimizer's step of {stage.title}")
        self._drop_gradients(stage)
        # What has been stepped stands, be it above the budget: the next batches are for smaller micro-batches.
        if steps.taken and not self._fits(self._device.check_budget):
            self._shrink(stage)
        return loss

    @staticmethod
    def _steps(stage: Stage, step: int, *, at_once: bool) -> Arrivals:
        """What steps each layer, in backward or after it."""
        residency = stage.residency

        def act(number: int) -> None:
            optimizer = residency.optimizers[number]
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()

        by_units, in_chunks = stage.objective.by_units, stage.is_last and stage.chunk_rows is not None
        late = late_names(residency.layers, residency.name_of, by_units=by_units, in_chunks=in_chunks)
        # What is to be clipped, or may have overflowed, waits for all gradients.
        waits = stage.clip_norm is not None or stage.loss_scale.moves
        at_once = at_once and stage.steps_in_backward and not waits
        return Arrivals(residency.groups, residency.parameters, late, act, at_once=at_once, by_units=by_units)

    @staticmethod
    def _finish(stage: Stage, steps: Arrivals) -> None:
        """The step of all that has not been stepped in backward."""
        gradients = [parameter.grad for parameter in stage.residency.trainable.values() if parameter.grad is not None]
        overflowed = not unscale(gradients, stage.loss_scale)
        stage.loss_scale.update(overflowed=overflowed)
        if overflowed:
            return
        if stage.clip_norm is not None:
            nn.utils.clip_grad_norm_(stage.residency.in_model_order(), stage.clip_norm)
        steps.finish()

    def measure(self, stage: Stage, feed: Feed) -> list[Tally]:
        """Loss and accuracy over a feed, in eval mode.

        Args:
            stage: the partition.
            feed: its samples.

        Returns:
            One tally for the partition's outputs; where its objective is by units, one for the scores of each.
        """
        by_units = stage.objective.by_units
        tallies = [Tally() for _ in (stage.residency.layers if by_units else (None,))]

        def count(outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[float, int, int | None]:
            loss = float(stage.objective.loss(outputs, labels))
            return loss, labels.numel(), stage.objective.num_correct(outputs, labels) if by_units or stage.is_last else None

        def consume(counts: list[tuple[float, int, int | None]]) -> None:
            for tally, counted in zip(tallies, counts, strict=True):
                tally.add(*counted)

        if by_units:
            layers = stage.residency.layers
            self._forward(
                stage,
                feed,
                lambda inputs, labels: [
                    [count((scores,), self._device.place(labels)) for scores in scores_by_units(layers, inputs)]
                ],
                consume,
            )
        else:
            self.forward(stage, feed, lambda outputs, labels: [count(outputs, self._device.place(labels))], consume)
        return tallies

    def emit(self, stage: Stage, feed: Feed, writer: ActivationWriter, on_micro_batch: Callable[[], None]) -> None:
        """Write the partition's outputs, in the feed's own order, in eval mode.

        Args:
            stage: the partition.
            feed: its samples.
            writer: of the next boundary's store.
            on_micro_batch: called now and then; what it raises ends the writing.
        """

        def write(fetched: Batch) -> None:
            with self._stalls.waiting("disk"):
                writer.append(*fetched)
            on_micro_batch()

        self.forward(
            stage, feed, lambda outputs, labels: (tuple(self._device.fetch(tensor) for tensor in outputs), labels), write
        )

    def forward(
        self, stage: Stage, feed: Feed, work: Callable[[tuple[Tensor, ...], Tensor], _T], consume: Callable[[_T], None]
    ) -> None:
        """Run samples forward in eval mode, without gradients.

        Args:
            stage: the partition.
            feed: its samples.
            work: what to do on the device with each micro-batch's outputs (of the last partition: chunk by chunk), on the device,
                and their labels, on the host; done again, with fewer samples, where it runs out of memory.
            consume: takes what `work` gave, once for every sample.
        """
        chunk_rows = stage.chunk_rows if stage.is_last else None
        layers = stage.residency.layers
        self._forward(stage, feed, lambda inputs, labels: outputs_in_chunks(layers, inputs, labels, chunk_rows, work), consume)

    def _forward(
        self, stage: Stage, feed: Feed, run: Callable[[tuple[Tensor, ...], Tensor], list[_T]], consume: Callable[[_T], None]
    ) -> None:
        """Samples through a stage in eval mode; `run` takes a micro-batch on the device, and its labels on the host."""
        for layer in stage.residency.layers:
            layer.module.eval()
        for inputs, labels in self._stalls.over(feed.waits_for, feed.batches(stage.batch_size, shuffle=False)):
            begin = 0
            while begin < len(labels):
                part = slice(begin, begin + stage.micro_batch)
                batch = tuple(tensor[part] for tensor in inputs), labels[part]
                result = self._unless_full(lambda batch=batch: self._run_eval(batch, run))  # type: ignore[misc]
                del batch
                if result is None:
                    self._shrink(stage)
                    continue
                for item in result:
                    consume(item)
                del result
                begin = part.stop
            del inputs, labels  # the feed gives the next before these names are bound to it

    def _run_eval(self, batch: Batch, run: Callable[[tuple[Tensor, ...], Tensor], list[_T]]) -> list[_T]:
        inputs, labels = batch
        with torch.no_grad():
            result = run(tuple(place_aligned(self._device, tensor) for tensor in inputs), labels)
        self._device.check_budget()
        return result

    def _accumulate(self, stage: Stage, batch: Batch, step: int, parts: Sequence[slice], steps: Arrivals) -> float:
        """Forward and backward of a batch's micro-batches, in ascending order; each loss weighs its share of the batch."""
        inputs, labels = batch
        loss_sum = 0.0
        chunk_rows = stage.chunk_rows if stage.is_last else None
        for number, part in enumerate(parts):
            torch.manual_seed(seed_of(self._seed, "forward", stage.number, step, number))
            share = (part.stop - part.start) / len(labels)
            with self._stalls.waiting("copy"):
                placed = tuple(place_aligned(self._device, tensor[part]) for tensor in inputs)
                targets = place_aligned(self._device, labels[part])
            with steps:
                loss_sum += backward_from_loss(
                    stage.residency.layers, placed, targets, stage.objective, share, chunk_rows, stage.loss_scale.value
                )
            del placed
            if not steps.taken:
                self._device.check_budget()
        return loss_sum

    @staticmethod
    def _unless_full(work: Callable[[], _T]) -> _T | None:
        """The work's result, or None if memory ran out in it; the exception, which holds tensors, is gone by then."""
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return None

    @classmethod
    def _fits(cls, work: Callable[[], object]) -> bool:
        """Whether the work went through; False if memory ran out in it."""
        return cls._unless_full(lambda: (work(),)) is not None

    def _shrink(self, stage: Stage) -> None:
        self._drop_gradients(stage)
        self._device.release()
        if stage.micro_batch <= stage.smallest_micro_batch:
            raise self._too_large(stage, f"for {stage.title} with a micro-batch of {stage.micro_batch}, the smallest")
        stage.micro_batch = max(stage.smallest_micro_batch, stage.micro_batch // 2)
        self._on_shrink(stage)
        self._device.begin_section()

    def _too_large(self, stage: Stage, what: str) -> BudgetError:
        used, budget = format_bytes(self._device.section_peak_bytes()), format_bytes(self._device.budget_bytes)
        return BudgetError(
            f"memory ran out {what}: {used} of {budget} were in use; give a larger --max-gpu-mem, or more partitions"
        )

    @staticmethod
    def _drop_gradients(stage: Stage) -> None:
        for parameter in stage.residency.trainable.values():
            parameter.grad = None


def too_few(num_samples: int, title: str, smallest: int) -> DataError:
    """The error of an epoch without a batch that could be learnt from."""
    return DataError(
        f"{num_samples} training samples make no batch that {title} can learn from: its modules need at least {smallest} samples at once; "
        "give more samples"
    )
