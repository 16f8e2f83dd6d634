"""Similarity matching: the paper's formula, computed plainly; heads that learn with it, and beside it."""

import math

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.methods.heads import make_head
from lowmem_pnn.methods.similarity import SimilarityHead, exit_head, similarity_loss, unit_vectors
from lowmem_pnn.model.chain import TensorSpec


def cosine(one: list[float], other: list[float]) -> float:
    """The cosine of two vectors, each less its mean."""
    first = [value - sum(one) / len(one) for value in one]
    second = [value - sum(other) / len(other) for value in other]
    norms = math.sqrt(sum(value**2 for value in first)) * math.sqrt(sum(value**2 for value in second))
    return sum(a * b for a, b in zip(first, second, strict=True)) / norms


@pytest.mark.parametrize("mixed", [False, True])
def test_the_loss_is_the_papers(mixed: bool) -> None:
    features = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 2, 1, 2, 0])
    one_hot = [[float(number == label) for number in range(3)] for label in classes.tolist()]
    targets: Tensor = classes
    if mixed:
        targets = torch.softmax(torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), 1)
        one_hot = targets.tolist()
    rows = features.tolist()
    pairs = [(i, j) for i in range(5) for j in range(5)]
    plain = sum((cosine(rows[i], rows[j]) - cosine(one_hot[i], one_hot[j])) ** 2 for i, j in pairs) / len(pairs)
    assert float(similarity_loss(unit_vectors(features), targets, 3)) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("ignored", [-100, 1])
def test_samples_whose_label_is_left_out_are_compared_with_none(ignored: int) -> None:
    features = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    classes, counted = torch.tensor([0, ignored, 2, 2, ignored]), [0, 2, 3]
    plain = similarity_loss(unit_vectors(features[counted]), classes[counted], 3, ignored)
    found = similarity_loss(unit_vectors(features), classes, 3, ignored)
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(torch.autograd.grad(found, features), torch.autograd.grad(plain, features))


def head_of(boundary: TensorSpec, *, scores_teach: bool) -> SimilarityHead:
    torch.manual_seed(0)
    return SimilarityHead(make_head("adaptive", boundary, [], 4, tokens=False), boundary, scores_teach=scores_teach)


@pytest.mark.parametrize("shape", [(6, 12, 12), (6, 4, 4), (6, 4, 4, 4), (9,), (5, 8), (6, 1, 1), (1, 8), (6, 4, 32)])
@pytest.mark.parametrize("scores_teach", [False, True])
def test_features_are_unit_vectors_beside_the_scores(shape: tuple[int, ...], scores_teach: bool) -> None:
    head = head_of(TensorSpec(shape, torch.float32), scores_teach=scores_teach)
    outputs = torch.randn(3, *shape, requires_grad=True)
    scores, vectors = head(outputs)
    assert scores.shape == (3, 4)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    scores.sum().backward(retain_graph=True)
    # Scores that do not teach the layer learn from it all the same.
    assert (outputs.grad is not None) == scores_teach
    assert all(one.grad is not None for one in exit_head(head).parameters())
    assert head.eval()(outputs).shape == (3, 4)


def test_the_features_of_a_map_are_deviations_of_a_convolution() -> None:
    head = head_of(TensorSpec((6, 4, 4), torch.float32), scores_teach=True)
    convolution = next(module for module in head.features.modules() if isinstance(module, nn.Conv2d))
    outputs = torch.randn(3, 6, 4, 4)
    _, vectors = head(outputs)
    plain = nn.functional.conv2d(outputs, convolution.weight, padding=1).view(3, 6, 16).std(2)
    centred = plain - plain.mean(1, keepdim=True)
    torch.testing.assert_close(vectors, centred / centred.norm(dim=1, keepdim=True))


def test_a_layer_that_gives_nothing_has_a_loss_and_a_gradient() -> None:
    head = head_of(TensorSpec((6, 4, 4), torch.float32), scores_teach=True)
    outputs = torch.zeros(3, 6, 4, 4, requires_grad=True)
    _, vectors = head(outputs)
    similarity_loss(vectors, torch.tensor([0, 1, 2]), 4).backward()
    assert outputs.grad is not None
    assert float(outputs.grad.abs().max()) < 10
