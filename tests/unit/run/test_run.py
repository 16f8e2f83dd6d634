"""What a run records: of a partition that another process has trained, of epochs, of validations."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from helpers.journals import PLAN, state
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.engine.tally import EpochProgress, Tally
from lowmem_pnn.methods import Sweep, Visit
from lowmem_pnn.model.chain import Chain, TensorSpec
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.run.run import Run
from lowmem_pnn.run.state import State
from lowmem_pnn.stores.disk import IoCounter


class Counting(nn.Module):
    """Goes by how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scaled: Tensor = self.linear(x) / (1 + self.calls)
        return scaled


def run_of(chain: Chain | None = None, **parts: Any) -> Run:
    """Return a run without weights, of the plan of `helpers.journals`."""
    run = Run.__new__(Run)
    run.plan, run.state, run.program = Plan.from_json(PLAN), state(), []
    run.workload = SimpleNamespace(chain=chain)  # type: ignore[assignment]
    run.session = SimpleNamespace(counter=IoCounter())  # type: ignore[assignment]
    for name, part in parts.items():
        setattr(run, name, part)
    return run


def test_a_partition_that_is_taken_over_has_its_modules_attributes() -> None:
    chain = capture(nn.Sequential(Counting(), Counting(), Counting()), TensorSpec((4,), torch.float32))
    before = chain.python_state
    assert before.keys() == {"0.calls", "1.calls", "2.calls"}
    run_of(chain).take_over(1, state(module_state={"0.calls": 7, "1.calls": 7, "2.calls": 5}))
    assert chain.python_state == {**before, "2.calls": 5}


def test_an_epoch_of_several_macro_batches_has_the_loss_of_them_all() -> None:
    places = [(0, 8), (8, 12), (0, 8)]
    run = run_of(program=[Visit("learn", 1, "train", macro_batch=place) for place in places])
    found = []
    for visit, loss in enumerate((1.0, 4.0, 0.5)):
        run.state.visit, run.state.progress = visit, EpochProgress()
        samples = places[visit][1] - places[visit][0]
        run.state.progress.tally.add(loss, samples, samples)
        run.complete_epoch(1)
        found.append(run.state.records[1].train_loss)
    assert found == [1.0, 2.0, 0.5]
    # A batch that is done again counts once.
    commit = State.from_journal(run.state.to_journal())
    run.state.epoch_tallies[1].add(9.0, 8, 8)
    run.state.go_back_to(commit)
    assert run.state.epoch_tallies[1].loss == 0.5


def test_a_validation_in_which_nothing_counts_is_no_best_one() -> None:
    said: list[str] = []
    run = run_of(
        program=[Sweep((), 2, 8)], _said_unmeasured=False, session=SimpleNamespace(display=SimpleNamespace(message=said.append))
    )
    config = SimpleNamespace(watches=True, monitored=(None, "val_loss"), keep_weights="best", recovery_epochs=0)
    run.workload = SimpleNamespace(config=config)  # type: ignore[assignment]
    for _ in range(2):
        run.record_validation(1, Tally(num_correct=0), [Tally(num_correct=0)])
        assert not run.watch(1, 5)
    record = run.state.records[1]
    assert (record.val_loss, record.val_accuracy, record.unit_val_accuracies) == (None, None, [])
    assert (run.state.best.value, run.state.without_gain) == (None, 2)
    assert said == ["no label of the validation part counts: it has no loss"]
