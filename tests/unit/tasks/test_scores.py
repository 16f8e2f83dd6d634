"""Scores of labels and values against scikit-learn's, whatever the micro-batches."""

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn

from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.tasks.classification import Classification
from lowmem_pnn.tasks.multilabel import MultiLabel
from lowmem_pnn.tasks.regression import Regression
from lowmem_pnn.tasks.task import Task

PARTS = (slice(0, 30), slice(30, 33), slice(33, 90))
RANDOM = torch.Generator().manual_seed(1)


def scores_of(task: Task, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, float]:
    total = task.scores()
    for part in PARTS:
        one = task.scores()
        one.add((outputs[part],), targets[part])
        total.merge(one)
    return total.result()


def test_scores_of_labels() -> None:
    outputs = torch.randn(90, 4, generator=RANDOM)
    targets = (outputs + torch.randn(90, 4, generator=RANDOM) > 0.3).float()
    found = scores_of(MultiLabel(Targets("labels", 4, (4,), torch.float32)), outputs, targets)
    given, y = (outputs > 0).numpy(), targets.numpy()
    assert found["loss"] == pytest.approx(float(nn.functional.binary_cross_entropy_with_logits(outputs, targets)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float((given == (y > 0)).mean()))
    assert found["f1"] == pytest.approx(metrics.f1_score(y, given, average="macro"))
    expected = metrics.average_precision_score(y, torch.sigmoid(outputs).numpy(), average="macro")
    assert found["average_precision"] == pytest.approx(expected, abs=2e-3)


def test_labels_that_are_rare_have_an_average_precision_too() -> None:
    for low, high, spread in ((-12.0, -8.0, 0.8), (0.0, 0.02, 0.004)):
        y = torch.zeros(90, 1)
        y[::30] = 1
        outputs = torch.where(y > 0, high, low) + spread * torch.randn(90, 1, generator=torch.Generator().manual_seed(0))
        found = scores_of(MultiLabel(Targets("labels", 1, (1,), torch.float32)), outputs, y)
        expected = metrics.average_precision_score(y.numpy(), outputs.numpy())
        assert expected > 0.9
        assert found["average_precision"] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("values", [1, 3])
def test_scores_of_values(values: int) -> None:
    right = 1000 + torch.randn(90, values, generator=RANDOM)
    outputs = right + 0.3 * torch.randn(90, values, generator=RANDOM)
    found = scores_of(Regression(Targets("values", values, (values,), torch.float32)), outputs, right)
    assert found["mse"] == pytest.approx(metrics.mean_squared_error(right, outputs), rel=1e-5)
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(right, outputs), rel=1e-5)
    assert found["r2"] == pytest.approx(metrics.r2_score(right, outputs), rel=1e-4)


def test_classes_have_top_five_and_confusion() -> None:
    outputs, targets = torch.randn(90, 8, generator=RANDOM), torch.randint(0, 8, (90,), generator=RANDOM)
    found = scores_of(Classification(Targets("class", 8)), outputs, targets)
    assert found["top5"] == pytest.approx(metrics.top_k_accuracy_score(targets, outputs, k=5, labels=range(8)))
    assert np.array_equal(found["confusion"], metrics.confusion_matrix(targets, outputs.argmax(1), labels=range(8)))


def test_masks_have_a_mean_intersection_over_union() -> None:
    outputs, targets = torch.randn(90, 3, 4, 4, generator=RANDOM), torch.randint(0, 3, (90, 4, 4), generator=RANDOM).byte()
    targets[:, 0] = 255
    found = scores_of(Classification(Targets("mask", 3, (4, 4), torch.uint8, 255)), outputs, targets)
    seen, predicted = targets[:, 1:].flatten(), outputs.argmax(1)[:, 1:].flatten()
    assert found["miou"] == pytest.approx(metrics.jaccard_score(seen, predicted, average="macro"))
    assert found["accuracy"] == pytest.approx(float((seen == predicted).float().mean()))


def test_nothing_that_counts_has_no_scores() -> None:
    masks = Classification(Targets("mask", 3, (4, 4), torch.uint8, 255))
    assert scores_of(masks, torch.randn(90, 3, 4, 4), torch.full((90, 4, 4), 255, dtype=torch.uint8)) == {}
    tokens = Classification(Targets("tokens", 5, (7,), torch.int64, -100))
    assert scores_of(tokens, torch.randn(90, 7, 5), torch.full((90, 7), -100)) == {}
    # Labels whose classes weigh nothing in the loss are right or wrong all the same.
    weighed = Classification(Targets("class", 2), class_weights=(0.0, 1.0))
    found = scores_of(weighed, torch.tensor([[1.0, 0.0]]).expand(90, 2), torch.zeros(90, dtype=torch.int64))
    assert (found.keys() & {"loss", "accuracy"}, found["accuracy"]) == ({"accuracy"}, 1.0)
