"""The executor: runs one visit inside a residency, batch by batch, and undoes a batch that does not fit.

A batch is the transaction: nothing that outlives it changes before the optimizer's step, so running out of memory in it (or a meter
that shows more than the budget) is undone by dropping the gradients and restoring the buffers; then it is done again with half the
micro-batch. The batch that the optimizer sees stays the same, by accumulation.

Where a batch goes through at once, layers step during its backward (`lowmem_pnn.engine.optimizer_in_backward`). Memory that runs out after the first step
cannot be undone here: `SteppedInPart` says so, and the last commit can be gone back to.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowmem_pnn.device import Device, Download, is_out_of_memory
from lowmem_pnn.engine.active_partition import ActivePartition
from lowmem_pnn.engine.loaders import Batch, Loader
from lowmem_pnn.engine.optimizer_in_backward import OptimizerInBackward
from lowmem_pnn.engine.passes import backward_from_loss, micro_batches, outputs_in_chunks, scores_per_layer
from lowmem_pnn.engine.stalls import Stalls
from lowmem_pnn.engine.tally import EpochProgress, Tally
from lowmem_pnn.engine.uploads import Piece, Uploads
from lowmem_pnn.errors import BudgetError, DataError, DivergedError
from lowmem_pnn.model.precision import unscale
from lowmem_pnn.seeds import seed_of
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
        on_shrink: Callable[[ActivePartition], None] = lambda stage: None,
        stalls: Stalls | None = None,
    ) -> None:
        self._stalls = stalls or Stalls()
        self._device = device
        self._seed = seed
        self._on_shrink = on_shrink
        self._uploads = Uploads(device)

    def prepare(self, stage: ActivePartition) -> None:
        """Make what the stage's objective needs on the device.

        Raises:
            BudgetError: it does not fit.
        """
        if not self._fits(lambda: stage.objective.prepare(self._device.torch_device)):
            raise self._too_large(stage, f"for the objective of {stage.title}")

    def learn_epoch(
        self,
        stage: ActivePartition,
        loader: Loader,
        progress: EpochProgress,
        on_batch: Callable[[float | None], None],
        *,
        epochs_before: int = 0,
        steps_before: int = 0,
    ) -> None:
        """Train over one epoch's samples, from where `progress` says.

        Args:
            stage: the partition.
            loader: its training samples.
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
        steps = math.ceil(loader.num_samples / stage.batch_size)
        for layer in stage.residency.layers:
            layer.module.train()
        epoch = epochs_before + progress.epoch
        batches = loader.batches(
            stage.batch_size, shuffle=stage.shuffle, epoch=epoch, start=progress.batch, drawn=("epoch", epoch)
        )
        for batch, following in self._uploads.over(self._stalls.over(loader.waits_for, batches)):
            loss = None
            if len(batch[1]) >= stage.smallest_micro_batch:  # a last batch of 1 tells BatchNorm nothing
                step = steps_before + progress.epoch * steps + progress.batch
                loss = self.train_batch(stage, batch, step, following)
                if not math.isfinite(loss):
                    raise DivergedError(
                        f"the loss became {loss} in {stage.title}, epoch {progress.epoch + 1}, batch {progress.batch + 1}; "
                        f"the last commit is kept; {stage.loss_scale.remedy}"
                    )
                progress.tally.add(loss, len(batch[1]))
            progress.batch += 1
            del batch, following
            on_batch(loss)
        if not progress.tally.num_samples:
            raise too_few(loader.num_samples, stage.title, stage.smallest_micro_batch)
        progress.epoch += 1
        progress.batch = 0

    def train_batch(self, stage: ActivePartition, batch: Batch, step: int, following: Batch | None = None) -> float:
        """One optimizer step; done again with smaller micro-batches until it fits.

        Args:
            stage: the partition.
            batch: boundary tensors (B, ...) and labels (B,), on the host.
            step: the partition's steps so far, which seeds the batch's random choices.
            following: the batch after it, where it is there already.

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
            parts = self._parts(stage, batch)
            steps = self._steps(stage, step, at_once=len(parts) == 1)
            loss = self._unless_full(partial(self._accumulate, stage, batch, step, parts, steps, following))
            if loss is not None:
                break
            if steps.taken:
                raise SteppedInPart(str(self._too_large(stage, f"in a batch of {stage.title} that was stepped in part")))
            stage.residency.settle_buffers()
            for name, tensor in stage.residency.buffers.items():
                tensor.copy_(buffers[name])
            self.shrink(stage)
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
            self.shrink(stage)
        return loss

    @staticmethod
    def _steps(stage: ActivePartition, step: int, *, at_once: bool) -> OptimizerInBackward:
        """What steps each layer, in backward or after it."""
        residency = stage.residency

        def act(number: int) -> None:
            optimizer = residency.optimizers[number]
            for group in optimizer.param_groups:
                group["lr"] = stage.learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()

        # What is to be clipped, or may have overflowed, waits for all gradients.
        waits = stage.clip_norm is not None or stage.loss_scale.moves
        at_once = at_once and stage.steps_in_backward and not waits
        return OptimizerInBackward(
            residency.groups,
            residency.parameters,
            stage.late,
            act,
            at_once=at_once,
            per_layer_loss=stage.objective.per_layer_loss,
        )

    @staticmethod
    def _finish(stage: ActivePartition, steps: OptimizerInBackward) -> None:
        """The step of all that has not been stepped in backward."""
        gradients = [parameter.grad for parameter in stage.residency.trainable.values() if parameter.grad is not None]
        overflowed = not unscale(gradients, stage.loss_scale)
        stage.loss_scale.update(overflowed=overflowed)
        if overflowed:
            return
        if stage.clip_norm is not None:
            nn.utils.clip_grad_norm_(stage.residency.in_model_order(), stage.clip_norm)
        steps.finish()

    def measure(self, stage: ActivePartition, loader: Loader) -> list[Tally]:
        """Loss and accuracy over a loader, in eval mode.

        Args:
            stage: the partition.
            loader: its samples.

        Returns:
            One tally for the partition's outputs; where its objective is by units, one for the scores of each.
        """
        per_layer_loss = stage.objective.per_layer_loss
        tallies = [Tally() for _ in (stage.residency.layers if per_layer_loss else (None,))]

        def count(outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[float, int, int | None]:
            loss = float(stage.objective.loss(outputs, labels))
            return loss, labels.numel(), stage.objective.num_correct(outputs, labels) if per_layer_loss or stage.is_last else None

        def consume(counts: list[tuple[float, int, int | None]]) -> None:
            for tally, counted in zip(tallies, counts, strict=True):
                tally.add(*counted)

        if per_layer_loss:
            layers = stage.residency.layers
            self._forward(
                stage,
                loader,
                lambda inputs, labels: [
                    [count((scores,), self._device.to_device(labels)) for scores in scores_per_layer(layers, inputs)]
                ],
                consume,
            )
        else:
            self.forward(stage, loader, lambda outputs, labels: [count(outputs, self._device.to_device(labels))], consume)
        return tallies

    def emit(self, stage: ActivePartition, loader: Loader, writer: ActivationWriter, on_micro_batch: Callable[[], None]) -> None:
        """Write the partition's outputs, in the loader's own order, in eval mode.

        Args:
            stage: the partition.
            loader: its samples.
            writer: of the next boundary's store.
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

        self.forward(stage, loader, bring_down, write)

    def forward(
        self,
        stage: ActivePartition,
        loader: Loader,
        work: Callable[[tuple[Tensor, ...], Tensor], _T],
        consume: Callable[[_T], None],
    ) -> None:
        """Run samples forward in eval mode, without gradients.

        Args:
            stage: the partition.
            loader: its samples.
            work: what to do on the device with each micro-batch's outputs (of the last partition: chunk by chunk), on the device,
                and their labels, on the host; done again, with fewer samples, where it runs out of memory.
            consume: takes what `work` gave, once for every sample.
        """
        chunk_rows = stage.chunk_rows if stage.is_last else None
        layers = stage.residency.layers
        self._forward(stage, loader, lambda inputs, labels: outputs_in_chunks(layers, inputs, labels, chunk_rows, work), consume)

    def _forward(
        self,
        stage: ActivePartition,
        loader: Loader,
        run: Callable[[tuple[Tensor, ...], Tensor], list[_T]],
        consume: Callable[[_T], None],
    ) -> None:
        """Samples through a stage in eval mode; `run` takes a micro-batch on the device, and its labels on the host."""
        for layer in stage.residency.layers:
            layer.module.eval()
        # Where copies go on beside the computing, what comes of a micro-batch is consumed while the next one is computed.
        results: deque[_T] = deque()
        batches = self._stalls.over(loader.waits_for, loader.batches(stage.batch_size, shuffle=False))
        for batch, following in self._uploads.over(batches):
            begin, total = 0, len(batch[1])
            while begin < total:
                part = slice(begin, begin + stage.micro_batch)
                after = Piece.of(batch, slice(part.stop, part.stop + stage.micro_batch)) if part.stop < total else None
                if after is None and following is not None:
                    after = Piece.of(following, slice(0, stage.micro_batch))
                result = self._unless_full(partial(self._run_eval, Piece.of(batch, part), batch[1][part], after, run))
                del after
                self._consume(results, consume)
                if result is None:
                    self.shrink(stage)
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
        self, piece: Piece, labels: Tensor, after: Piece | None, run: Callable[[tuple[Tensor, ...], Tensor], list[_T]]
    ) -> list[_T]:
        with self._stalls.waiting("copy"):
            inputs = self._uploads.take(piece, after)
        with torch.no_grad():
            result = run(inputs, labels)
        self._device.check_budget()
        return result

    def _accumulate(
        self,
        stage: ActivePartition,
        batch: Batch,
        step: int,
        parts: Sequence[slice],
        steps: OptimizerInBackward,
        following: Batch | None,
    ) -> float:
        """Forward and backward of a batch's micro-batches, in ascending order; each loss weighs its share of the batch."""
        labels = batch[1]
        loss_sum = 0.0
        chunk_rows = stage.chunk_rows if stage.is_last else None
        pieces = [Piece.of(batch, part, with_labels=True) for part in parts]
        then = None if following is None else Piece.of(following, self._parts(stage, following)[0], with_labels=True)
        for number, part in enumerate(parts):
            torch.manual_seed(seed_of(self._seed, "forward", stage.number, step, number))
            share = (part.stop - part.start) / len(labels)
            with self._stalls.waiting("copy"):
                *placed, targets = self._uploads.take(pieces[number], pieces[number + 1] if number + 1 < len(pieces) else then)
            with steps:
                loss_sum += backward_from_loss(
                    stage.residency.layers, tuple(placed), targets, stage.objective, share, chunk_rows, stage.loss_scale.value
                )
            del placed
            if not steps.taken:
                self._device.check_budget()
        return loss_sum

    @staticmethod
    def _parts(stage: ActivePartition, batch: Batch) -> Sequence[slice]:
        return micro_batches(len(batch[1]), stage.micro_batch, stage.smallest_micro_batch)

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

    def shrink(self, stage: ActivePartition) -> None:
        """Give memory back, and go on with half the micro-batch.

        Raises:
            BudgetError: it is the smallest already.
        """
        self._drop_gradients(stage)
        self._uploads.drop()
        self._device.settle()
        self._device.release()
        if stage.micro_batch <= stage.smallest_micro_batch:
            raise self._too_large(stage, f"for {stage.title} with a micro-batch of {stage.micro_batch}, the smallest")
        stage.micro_batch = max(stage.smallest_micro_batch, stage.micro_batch // 2)
        self._on_shrink(stage)
        self._device.begin_section()

    def _too_large(self, stage: ActivePartition, what: str) -> BudgetError:
        used, budget = format_bytes(self._device.section_peak_bytes()), format_bytes(self._device.budget_bytes)
        return BudgetError(
            f"memory ran out {what}: {used} of {budget} were in use; give a larger --max-gpu-mem, or more partitions"
        )

    @staticmethod
    def _drop_gradients(stage: ActivePartition) -> None:
        for parameter in stage.residency.trainable.values():
            parameter.grad = None


def too_few(num_samples: int, title: str, smallest: int) -> DataError:
    """The error of an epoch without a batch that could be learnt from."""
    return DataError(
        f"{num_samples} training samples make no batch that {title} can learn from: its modules need at least {smallest} samples at once; "
        "give more samples"
    )
