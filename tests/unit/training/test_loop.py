"""The training loop: when the model is measured, and how its epochs end, without a model."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.journals import state
from lowmem_pnn.engine.epoch import first_batches, train_epoch
from lowmem_pnn.engine.tally import EpochProgress, Tally
from lowmem_pnn.errors import DataError
from lowmem_pnn.methods import Sweep
from lowmem_pnn.run.run import Run
from lowmem_pnn.training.loop import EpochLoop


class Learner:
    """Learns nothing, from batches of 4 samples; notes where it is measured."""

    title, action, partition, micro_batch = "all partitions", "sweep", 0, 4
    num_samples, smallest_batch, num_epochs = 20, 1, 3
    epochs_before = steps_before = 0
    steps_per_epoch = 5
    is_joint, may_learn_nothing, measures_within_epochs = False, False, True

    def __init__(self, max_steps: int | None = None) -> None:
        self.measured: list[str] = []
        self._most = max_steps or 10**6

    def count(self, batch: Any) -> float:
        return 4.0

    def batches(self, epoch: int, start: int) -> Iterator[Any]:
        batch = (torch.zeros(4, 1),), torch.zeros(4)
        batches = iter([(batch, None)] * (self.steps_per_epoch - start))
        return first_batches(batches, self._most - epoch * self.steps_per_epoch - start)

    def train_batch(self, batch: Any, step: int, following: Any) -> float:
        return 2.0

    def learning_rate(self, step: int) -> float:
        return 0.1

    def after_batch(self, epoch: int, share: float) -> None: ...

    def save(self) -> list[int]:
        return []

    def validate(self, where: str) -> None:
        self.measured.append(where)


def run_of(told: list[Any], **options: Any) -> Any:
    """Return a run of a sweep, of which all but the loop's own doing is left out; `told` gets the epochs and steps that are logged."""
    run = Run.__new__(Run)
    run.program, run.state = [Sweep((), Learner.num_epochs, 4)], state(progress=EpochProgress())
    config = SimpleNamespace(
        **{"eval_every": None, "max_steps": None, "early_stop": None, "watches": False, "recovery_epochs": 0, **options}
    )
    display = SimpleNamespace(start_epoch=lambda *_: None, message=told.append)
    timer = SimpleNamespace(end=lambda _: None, paused=nullcontext)
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    replaced = {
        "workload": SimpleNamespace(config=config),
        "session": SimpleNamespace(display=display, device=SimpleNamespace(spills=False)),
        "metrics": SimpleNamespace(
            after_batch=nothing, log_step=nothing, log_validation=nothing, epoch_timer=lambda: timer, log_epoch=nothing
        ),
        "commits": SimpleNamespace(commit=nothing, commit_if_due=nothing),
    }
    for name, part in replaced.items():
        setattr(run, name, part)
    return run


@pytest.mark.parametrize(
    ("max_steps", "measured"),
    [
        (None, ["step 4", "epoch 1", "step 8", "epoch 2", "step 12", "epoch 3"]),
        (12, ["step 4", "epoch 1", "step 8", "epoch 2", "epoch 3"]),
        (14, ["step 4", "epoch 1", "step 8", "epoch 2", "step 12", "epoch 3"]),
    ],
)
def test_the_model_is_measured_once_where_training_ends(max_steps: int | None, measured: list[str]) -> None:
    learner = Learner(max_steps)
    run, watched = run_of([], eval_every=4, max_steps=max_steps), list[int]()
    run.watch = lambda partition, step: watched.append(step)
    EpochLoop(run, learner).train()  # type: ignore[arg-type]
    assert learner.measured == measured
    assert watched[-1] == (max_steps or 15), "the steps of a last epoch that was cut short"


class Unlabelled(Learner):
    """Has no batch in which anything counts."""

    def count(self, batch: Any) -> float:
        return 0.0


def test_only_an_epoch_that_is_a_share_of_one_may_have_nothing_to_learn_from() -> None:
    learner, progress = Unlabelled(), EpochProgress()
    with pytest.raises(DataError, match="20 training samples make no batch that all partitions can learn from"):
        train_epoch(learner, EpochProgress(), lambda loss: None)
    learner.may_learn_nothing = True
    assert train_epoch(learner, progress, lambda loss: None)
    assert (progress.epoch, progress.batch, progress.tally.loss) == (1, 0, None)


def test_an_epoch_in_which_patience_has_run_out_ends_where_it_is() -> None:
    """As after a kill between the commit and the end of training."""
    told: list[Any] = []
    run = run_of(told, eval_every=3, early_stop=2, monitor="val_loss")
    run.state.progress, run.state.without_gain = EpochProgress(1, 1, Tally(3.0, None, 4, 4)), 2
    EpochLoop(run, Learner()).train()  # type: ignore[arg-type]
    assert (run.state.records[0].train_loss, run.state.stopped_after, run.state.stopped_step) == (0.75, 1, 6)
    assert told == ["training ends after step 6: val_loss was never a finite number"]
