"""What learns in a visit: where it says that it is, and whether it may have nothing to learn from."""

from types import SimpleNamespace
from typing import Any

import pytest

from lowmem_pnn.engine.tally import Tally
from lowmem_pnn.errors import DivergedError
from lowmem_pnn.methods import Visit
from lowmem_pnn.training.partition_learner import PartitionLearner, may_learn_nothing


def test_a_loss_that_is_not_finite_is_told_with_the_epochs_of_earlier_visits() -> None:
    learner: Any = PartitionLearner.__new__(PartitionLearner)
    learner.title, learner.epochs_before, learner.steps_before, learner.steps_per_epoch = "partition 1", 2, 10, 5
    learner._executor = SimpleNamespace(train_batch=lambda *_: float("nan"))
    learner._active = SimpleNamespace(loss_scale=SimpleNamespace(moves=False, remedy="try a lower --lr"))
    with pytest.raises(DivergedError, match=r"^the loss became nan in partition 1, epoch 4, batch 3; "):
        learner.train_batch((), 7, None)


@pytest.mark.parametrize(
    ("macro_batch", "learnt", "may"),
    [(None, 0, False), ((0, 8), 0, True), ((8, 9), 8, True), ((8, 9), 0, False), ((0, 9), 9, False)],
    ids=["all samples", "others follow", "others were learnt from", "nothing was learnt from", "of the epoch before"],
)
def test_a_macro_batch_may_have_nothing_to_learn_from_where_its_epoch_has(
    macro_batch: tuple[int, int] | None, learnt: int, may: bool
) -> None:
    tallies = [Tally(), Tally(num_samples=learnt)]
    run: Any = SimpleNamespace(workload=SimpleNamespace(splits={"train": range(9)}), state=SimpleNamespace(epoch_tallies=tallies))
    assert may_learn_nothing(run, Visit("learn", 1, "train", macro_batch=macro_batch)) == may
