"""What learns in a visit: where it says that it is."""

from types import SimpleNamespace
from typing import Any

import pytest

from lowmem_pnn.errors import DivergedError
from lowmem_pnn.training.partition_learner import PartitionLearner


def test_a_loss_that_is_not_finite_is_told_with_the_epochs_of_earlier_visits() -> None:
    learner: Any = PartitionLearner.__new__(PartitionLearner)
    learner.title, learner.epochs_before, learner.steps_before, learner.steps_per_epoch = "partition 1", 2, 10, 5
    learner._executor = SimpleNamespace(train_batch=lambda *_: float("nan"))
    learner._active = SimpleNamespace(loss_scale=SimpleNamespace(moves=False, remedy="try a lower --lr"))
    with pytest.raises(DivergedError, match=r"^the loss became nan in partition 1, epoch 4, batch 3; "):
        learner.train_batch((), 7, None)
