"""The training loop: the epochs of a visit or a sweep, with logging, validation and commits, from wherever the run's state says."""

from collections.abc import Sequence
from typing import Literal, Protocol

from lowmem_pnn.engine.epoch import Learner, train_epoch
from lowmem_pnn.engine.pace import Pace
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


def train_epochs(run: Run, learner: EpochsLearner) -> None:
    """Train for the epochs that are left.

    Args:
        run: at a commit, or inside a visit or sweep whose epochs have begun.
        learner: what learns.

    Raises:
        SteppedInPart: memory ran out after some of the weights were stepped; only a commit can be gone back to.
        Stopped: the run was asked to stop; everything up to then is committed.
        DivergedError: a loss is not finite.
        BudgetError: not even the smallest micro-batch fits.
    """
    progress, metrics, display = run.state.progress, run.metrics, run.session.display
    steps, done_here, before = learner.steps_per_epoch, 0, learner.epochs_before
    pace = Pace(display.message) if run.session.device.spills else None
    config = run.workload.config
    eval_every = config.eval_every if learner.measures_within_epochs else None

    def steps_done() -> int:
        return learner.steps_before + progress.epoch * steps + progress.batch

    def next_validation() -> int | None:
        """Return the number of the batch, in the present epoch, before which the model is measured."""
        if eval_every is None:
            return None
        more = eval_every - steps_done() % eval_every
        # After the last step of all the model is measured anyway.
        return None if config.max_steps is not None and steps_done() + more >= config.max_steps else progress.batch + more

    def after_batch(loss: float | None) -> None:
        nonlocal done_here
        done_here += 1
        if pace is not None:
            pace.step()
        metrics.after_batch(learner.title)
        learner.after_batch(progress.epoch, progress.batch / steps)
        done = steps_done()
        metrics.log_step(learner.action, learner.partition, before + progress.epoch, done, loss, learner.learning_rate)
        # Where the model is measured, the commit comes after that: then position and measurements belong together.
        if progress.batch < steps and not (eval_every and done % eval_every == 0):
            commit_within_epoch(is_best=False)

    def commit_within_epoch(*, is_best: bool) -> None:
        if learner.is_joint:
            return
        # A sweep that runs out of memory goes back to its last commit; what shows in its first batches costs no more than these.
        if is_best or (learner.action == "sweep" and done_here == _BATCHES_BEFORE_COMMIT):
            run.commits.commit(learner.save)
        run.commits.commit_if_due(learner.save)

    def show_epoch() -> None:
        done = int(progress.tally.num_samples)
        display.start_epoch(learner.title, before + progress.epoch, before + learner.num_epochs, learner.num_samples, done)

    def train_to_next_validation() -> bool:
        """Return whether the epoch is over."""
        if train_epoch(learner, progress, after_batch, next_validation()):
            return True
        with timer.paused():
            learner.validate(f"step {steps_done()}")
        metrics.log_validation(learner.partition, before + progress.epoch, steps_done())
        commit_within_epoch(is_best=run.watch(learner.partition, steps_done()))
        show_epoch()
        return False

    while progress.epoch < learner.num_epochs and not run.is_out_of_patience():
        timer = metrics.epoch_timer()
        show_epoch()
        is_over = train_to_next_validation()
        while not is_over and not run.is_out_of_patience():
            is_over = train_to_next_validation()
        if not is_over:
            break
        timer.end(int(progress.tally.num_samples))
        run.complete_epoch(learner.partition)
        learner.validate(f"epoch {before + progress.epoch}")
        if not learner.is_joint:
            metrics.log_epoch(learner.action, learner.partition, before + progress.epoch, learner.micro_batch, timer)
        is_best = run.watch(learner.partition, steps_done())
        if progress.epoch < learner.num_epochs:
            # The weights that are kept are those of a commit.
            if is_best:
                run.commits.commit(learner.save)
            run.commits.commit_if_due(learner.save)
    if progress.epoch < learner.num_epochs:
        if progress.batch:
            run.complete_epoch(learner.partition)  # as far as it came, maybe in an earlier process
        run.stop_early(steps_done())
