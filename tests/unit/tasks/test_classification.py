"""Classification: loss against PyTorch's own, scores against references, whatever the micro-batches."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn

from helpers.tasks import classification


@pytest.mark.parametrize("num_classes", [2, 7])
def test_scores_are_those_of_scikit_learn_whatever_the_micro_batches(num_classes: int) -> None:
    generator = torch.Generator().manual_seed(1)
    # One class more than occurs, as a model's last layer may have.
    outputs = torch.randn(50, num_classes + 1, generator=generator)
    labels = torch.randint(0, num_classes, (50,), generator=generator)
    scores = classification().scores()
    for part in (slice(0, 30), slice(30, 33), slice(33, 50)):
        scores.add((outputs[part],), labels[part])
    found = scores.result()
    predicted = outputs.argmax(1).numpy()
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, labels)), rel=1e-5)
    assert found["accuracy"] == pytest.approx(float(np.mean(predicted == labels.numpy())))
    assert found["f1"] == pytest.approx(f1_score(labels.numpy(), predicted, average="macro"))


def test_scores_of_tokens_are_loss_and_perplexity_whatever_the_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(6, 5, 9, generator=generator)
    labels = torch.randint(0, 8, (6, 5), generator=generator)
    expected = float(nn.functional.cross_entropy(outputs.flatten(0, 1), labels.flatten()))
    rows = outputs.flatten(0, 1), labels.flatten()
    parted = [
        [(outputs, labels)],
        [(outputs[:1], labels[:1]), (outputs[1:], labels[1:])],
        [(rows[0][:7], rows[1][:7]), (rows[0][7:], rows[1][7:])],
        [(outputs.reshape(3, 2, 5, 9), labels.reshape(3, 2, 5))],
    ]
    for parts in parted:
        scores = classification("tokens", (5,)).scores()
        for output, label in parts:
            scores.add((output,), label)
        found = scores.result()
        assert found == {
            "loss": pytest.approx(expected, rel=1e-5),
            "perplexity": pytest.approx(math.exp(expected), rel=1e-5),
        }


def test_scores_of_low_precision_are_summed_in_float32() -> None:
    outputs, labels = torch.randn(2, 300, 4).bfloat16(), torch.zeros(2, 300, dtype=torch.int64)
    scores = classification("tokens", (5,)).scores()
    scores.add((outputs,), labels)
    expected = float(nn.functional.cross_entropy(outputs.double().flatten(0, 1), labels.flatten()))
    assert scores.result()["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_hopeless_perplexity_is_infinite() -> None:
    scores = classification("tokens", (5,)).scores()
    scores.add((torch.tensor([[[0.0, 5000.0]]]),), torch.tensor([[0]]))
    assert scores.result() == {"loss": 5000.0, "perplexity": math.inf}
