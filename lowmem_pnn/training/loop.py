"""The training loop: the epochs of a visit or a sweep, with logging, validation and commits, from wherever the run's state says."""

from collections.abc import Sequence
from typing import Literal, Protocol

from lowmem_pnn.engine.epoch import Learner, train_epoch
from lowmem_pnn.engine.pace import Pace
from lowmem_pnn.run.metrics import EpochTimer
from lowmem_pnn.run.run import Run

# Batches of a sweep after which its micro-batch has shown that it fits.
_BATCHES_BEFORE_COMMIT = 2


class EpochsLearner(Learner, Protocol):
    """What learns for some epochs, and can be measured, logged and saved between them."""

    action: Literal["learn", "sweep"]
    """The word for it in `metrics.jsonl`."""

    partition: int
    """Number of the partition whose record tells its losses."""

    num_epochs: int
    """Epochs of the visit or sweep."""

    epochs_before: int
    """Epochs of earlier visits of the same partition, or of the sweeps that this one goes on with."""

    steps_before: int
    """Optimizer steps of earlier visits of the same partition."""

    is_joint: bool
    """Whether other partitions have their share of the same epoch: then its end is logged, and commits are made, elsewhere."""

    @property
    def micro_batch(self) -> int:
        """Samples on the device at once, as it is by now."""
        ...

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0 over all visits of the partition."""
        ...

    def after_batch(self, epoch: int, share: float) -> None:
        """Do what is to go on beside training.

        Args:
            epoch: number of the epoch, from 0.
            share: part of the epoch that is done, 0 to 1.
        """
        ...

    def save(self) -> Sequence[int]:
        """Write its weights to working files, and return the partitions whose files changed: a `Save`."""
        ...

    @property
    def measures_within_epochs(self) -> bool:
        """Whether what it learns is the model's own task, so that a validation within an epoch tells of the model."""
        ...

    def validate(self, where: str) -> None:
        """Measure it on the validation split, where there is one, into the run's records.

        Args:
            where: what was trained until now, in words.
        """
        ...


class EpochLoop:
    """Trains for the epochs that are left of a visit or a sweep.

    Args:
        run: at a commit, or inside a visit or sweep whose epochs have begun.
        learner: what learns.
    """

    def __init__(self, run: Run, learner: EpochsLearner) -> None:
        self._run = run
        self._learner = learner
        self._progress = run.state.progress
        self._pace = Pace(run.session.display.message) if run.session.device.spills else None
        config = run.workload.config
        self._max_steps = config.max_steps
        self._eval_every = config.eval_every if learner.measures_within_epochs else None
        self._batches_done = 0
        """Batches that this process has trained."""

    def train(self) -> None:
        """Train until the last epoch is over, or the run is out of patience.

        Raises:
            SteppedInPart: memory ran out after some of the weights were stepped; only a commit can be gone back to.
            Stopped: the run was asked to stop; everything up to then is committed.
            DivergedError: a loss is not finite.
            BudgetError: not even the smallest micro-batch fits.
        """
        run = self._run
        while self._has_epochs_left and not run.is_out_of_patience():
            timer = run.metrics.epoch_timer()
            if not self._train_epoch(timer):
                break
            timer.end(int(self._progress.tally.num_samples))
            self._end_epoch(timer)
        if self._has_epochs_left:
            if self._progress.batch:
                run.complete_epoch(self._learner.partition)  # as far as it came, maybe in an earlier process
            run.stop_early(self._steps_done)

    @property
    def _has_epochs_left(self) -> bool:
        return self._progress.epoch < self._learner.num_epochs

    @property
    def _epoch(self) -> int:
        """Number of the present epoch, from 0, over all visits of the partition: of the next one, once it is over."""
        return self._learner.epochs_before + self._progress.epoch

    @property
    def _steps_done(self) -> int:
        """Optimizer steps by now, of all visits of the partition; an epoch that `--max-steps` cut short has not taken all of its own."""
        learner, progress = self._learner, self._progress
        done = learner.steps_before + progress.epoch * learner.steps_per_epoch + progress.batch
        return done if self._max_steps is None else min(done, self._max_steps)

    def _train_epoch(self, timer: EpochTimer) -> bool:
        """Train what is left of an epoch, and measure within it; return False if patience ran out before its end."""
        run, learner, progress = self._run, self._learner, self._progress
        self._show_epoch()
        while not train_epoch(learner, progress, self._after_batch, self._next_validation()):
            with timer.paused():
                learner.validate(f"step {self._steps_done}")
            run.metrics.log_validation(learner.partition, self._epoch, self._steps_done)
            self._commit_within_epoch(is_best=run.watch(learner.partition, self._steps_done))
            self._show_epoch()
            if run.is_out_of_patience():
                return False
        return True

    def _next_validation(self) -> int | None:
        """Return the number of the batch, in the present epoch, before which the model is measured."""
        if self._eval_every is None:
            return None
        more = self._eval_every - self._steps_done % self._eval_every
        # After the last step of all the model is measured anyway.
        is_measured_anyway = self._max_steps is not None and self._steps_done + more >= self._max_steps
        return None if is_measured_anyway else self._progress.batch + more

    def _after_batch(self, loss: float | None) -> None:
        run, learner, progress = self._run, self._learner, self._progress
        self._batches_done += 1
        if self._pace is not None:
            self._pace.step()
        run.metrics.after_batch(learner.title)
        learner.after_batch(progress.epoch, progress.batch / learner.steps_per_epoch)
        done = self._steps_done
        run.metrics.log_step(learner.action, learner.partition, self._epoch, done, loss, learner.learning_rate)
        # Where the model is measured, the commit comes after that: then position and measurements belong together.
        if progress.batch < learner.steps_per_epoch and not (self._eval_every and done % self._eval_every == 0):
            self._commit_within_epoch(is_best=False)

    def _commit_within_epoch(self, *, is_best: bool) -> None:
        learner, commits = self._learner, self._run.commits
        if learner.is_joint:
            return
        # A sweep that runs out of memory goes back to its last commit; what shows in its first batches costs no more than these.
        if is_best or (learner.action == "sweep" and self._batches_done == _BATCHES_BEFORE_COMMIT):
            commits.commit(learner.save)
        commits.commit_if_due(learner.save)

    def _end_epoch(self, timer: EpochTimer) -> None:
        """Measure, log and commit after an epoch's last batch."""
        run, learner = self._run, self._learner
        run.complete_epoch(learner.partition)
        learner.validate(f"epoch {self._epoch}")
        if not learner.is_joint:
            run.metrics.log_epoch(learner.action, learner.partition, self._epoch, learner.micro_batch, timer)
        is_best = run.watch(learner.partition, self._steps_done)
        if self._has_epochs_left:
            # The weights that are kept are those of a commit.
            if is_best:
                run.commits.commit(learner.save)
            run.commits.commit_if_due(learner.save)

    def _show_epoch(self) -> None:
        learner = self._learner
        self._run.session.display.start_epoch(
            learner.title,
            self._epoch,
            learner.epochs_before + learner.num_epochs,
            learner.num_samples,
            int(self._progress.tally.num_samples),
        )
