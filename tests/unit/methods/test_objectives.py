"""Objectives: cross entropy against the true labels."""

import torch
from torch import nn

from helpers.tasks import class_objective


def test_labels_are_cross_entropy_and_count_right_answers() -> None:
    scores, labels = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 5
    assert torch.equal(class_objective().loss((scores,), labels), nn.functional.cross_entropy(scores, labels))
    assert class_objective().num_correct((scores,), labels) == (int((scores.argmax(1) == labels).sum()), 9)


def test_labels_are_smoothed_where_another_output_than_the_first_learns() -> None:
    scores, labels = torch.randn(9, 5, requires_grad=True), torch.arange(9) % 5
    objective = class_objective(smoothing=0.2)
    objective.task.output = 1
    expected = nn.functional.cross_entropy(scores, labels, label_smoothing=0.2)
    assert torch.equal(objective.loss((scores.argmax(1), scores), labels), expected)
