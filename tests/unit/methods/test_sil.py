"""Synthetic intermediate labels: how class vectors are drawn, and the loss against them."""

from typing import Any

import pytest
import torch
from torch import nn

from lowmem_pnn.errors import DataError
from lowmem_pnn.methods import SyntheticLabels
from lowmem_pnn.methods.sil import draw_class_vectors
from lowmem_pnn.model.chain import TensorSpec

CPU = torch.device("cpu")
FLAT, MAP, TOKENS = TensorSpec((50,), torch.float32), TensorSpec((3, 4, 4), torch.float32), TensorSpec((6,), torch.int64)


def synthetic(*specs: TensorSpec, seed: int = 0, kappa: float = 10.0, classes: int = 6, **options: Any) -> SyntheticLabels:
    objective = SyntheticLabels(specs, classes, kappa, seed, **options)
    objective.prepare(CPU)
    return objective


def test_class_vectors_are_one_for_each_class_uniform_from_0_to_kappa() -> None:
    [vectors] = synthetic(TensorSpec((20_000,), torch.float32), kappa=4.0).class_vectors
    assert vectors.shape == (6, 20_000)
    assert 0 <= float(vectors.min()) < 0.001
    assert 3.999 < float(vectors.max()) < 4
    assert float(vectors.mean()) == pytest.approx(2, abs=0.02)
    assert float(vectors.std()) == pytest.approx(4 / 12**0.5, abs=0.02)
    assert len({tuple(row) for row in vectors[:, :5].tolist()}) == 6


DISTRIBUTIONS: list[Any] = ["uniform", "normal", "orthogonal", "sparse"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("classes", "shape"), [(6, (50,)), (5, (3, 4, 4)), (7, (7,)), (40, (3, 2)), (9, (1,)), (4, ()), (1, (8,))]
)
def test_class_vectors_have_the_shape_of_what_is_compared_with_them(
    distribution: Any, classes: int, shape: tuple[int, ...]
) -> None:
    vectors = draw_class_vectors([shape, (11,)], classes, 3.0, 0, distribution)
    assert [(tuple(one.shape), one.dtype) for one in vectors] == [
        ((classes, *shape), torch.float32),
        ((classes, 11), torch.float32),
    ]
    assert all(bool(one.isfinite().all()) for one in vectors)
    # What is drawn for one tensor does not depend on those after it.
    assert torch.equal(draw_class_vectors([shape], classes, 3.0, 0, distribution)[0], vectors[0])
    # Kappa is a scale, and nothing else.
    torch.testing.assert_close(draw_class_vectors([shape], classes, 6.0, 0, distribution)[0], 2 * vectors[0])


@pytest.mark.parametrize("distribution", ["normal", "orthogonal"])
@pytest.mark.parametrize(("classes", "shape"), [(6, (20_000,)), (10, (8, 40, 40)), (2_000, (60,))])
def test_normal_and_orthogonal_class_vectors_have_the_mean_and_the_deviation_of_uniform_ones(
    distribution: Any, classes: int, shape: tuple[int, ...]
) -> None:
    kappa = 4.0
    [drawn] = draw_class_vectors([shape], classes, kappa, 0, distribution)
    [uniform] = draw_class_vectors([shape], classes, kappa, 1, "uniform")
    # Four standard errors of a mean of so many elements, and as much for the deviation.
    error = 4 * kappa / (12 * drawn.numel()) ** 0.5
    for vectors in (drawn, uniform):
        assert float(vectors.mean()) == pytest.approx(kappa / 2, abs=error)
        assert float(vectors.std()) == pytest.approx(kappa / 12**0.5, abs=error)


@pytest.mark.parametrize(("classes", "shape"), [(6, (50,)), (10, (3, 4, 4)), (8, (8,))])
def test_orthogonal_class_vectors_are_equally_far_apart(classes: int, shape: tuple[int, ...]) -> None:
    kappa = 4.0
    [vectors] = draw_class_vectors([shape], classes, kappa, 3, "orthogonal")
    deviations = vectors.flatten(1) - kappa / 2
    expected = deviations.shape[1] * kappa**2 / 12
    torch.testing.assert_close(deviations @ deviations.T, expected * torch.eye(classes), rtol=1e-5, atol=1e-4)
    distances = torch.pdist(deviations)
    torch.testing.assert_close(distances, torch.full_like(distances, (2 * expected) ** 0.5))


def test_of_more_classes_than_elements_the_elements_are_orthogonal() -> None:
    [vectors] = draw_class_vectors([(5,)], 30, 4.0, 0, "orthogonal")
    deviations = vectors - 2
    torch.testing.assert_close(deviations.T @ deviations, 30 * 16 / 12 * torch.eye(5), rtol=1e-5, atol=1e-4)
    assert len({tuple(row) for row in vectors.tolist()}) == 30


@pytest.mark.parametrize(("classes", "elements"), [(6, 20_000), (2_000, 60)])
def test_a_fifth_of_the_elements_of_sparse_class_vectors_is_kappa(classes: int, elements: int) -> None:
    [vectors] = draw_class_vectors([(elements,)], classes, 7.0, 0, "sparse")
    assert set(vectors.unique().tolist()) == {0.0, 7.0}
    assert float((vectors == 7).float().mean()) == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / vectors.numel()) ** 0.5)


def test_class_vectors_follow_from_the_seed_alone() -> None:
    first, again, other = (synthetic(FLAT, MAP, seed=seed).class_vectors for seed in (1, 1, 2))
    torch.manual_seed(99)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_targets_follow_the_labels_in_any_order() -> None:
    objective = synthetic(FLAT)
    labels = torch.tensor([3, 0, 5, 3, 1])
    outputs = objective.class_vectors[0][labels]
    assert float(objective.loss((outputs,), labels)) == 0
    order = torch.tensor([4, 2, 0, 1, 3])
    assert float(objective.loss((outputs[order],), labels[order])) == 0
    assert float(objective.loss((outputs,), labels[order])) > 1


def test_the_loss_is_the_mean_over_all_elements_of_all_tensors() -> None:
    objective = synthetic(FLAT, MAP)
    labels = torch.tensor([0, 2])
    outputs = tuple(torch.zeros(2, *spec.shape, requires_grad=True) for spec in (FLAT, MAP))
    squares = torch.cat([vectors[labels].flatten() ** 2 for vectors in objective.class_vectors])
    assert float(objective.loss(outputs, labels).detach()) == pytest.approx(float(squares.mean()), rel=1e-6)


def test_tensors_that_pass_through_do_not_count_in_training_nor_in_what_is_measured_after_it() -> None:
    objective = synthetic(FLAT, MAP, TOKENS)
    labels = torch.tensor([0, 2, 1])
    learnt = torch.zeros(3, *MAP.shape, requires_grad=True)
    passing, tokens = torch.zeros(3, *FLAT.shape), torch.zeros(3, *TOKENS.shape, dtype=torch.int64)
    expected = nn.functional.mse_loss(learnt.detach(), objective.class_vectors[1][labels])
    assert torch.equal(objective.loss((passing, learnt, tokens), labels).detach(), expected)
    with torch.no_grad():
        assert torch.equal(objective.loss((passing, learnt.detach(), tokens), labels), expected)


SEQUENCE = TensorSpec((5, 7), torch.float32)


def test_pooled_labels_are_compared_with_means_over_positions() -> None:
    objective = synthetic(MAP, SEQUENCE, FLAT, target="pooled")
    # One value a channel, a feature, an element.
    assert [tuple(vectors.shape) for vectors in objective.class_vectors] == [(6, 3), (6, 7), (6, 50)]
    labels = torch.tensor([0, 2, 0])
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.rand(3, *spec.shape, generator=generator).requires_grad_() for spec in (MAP, SEQUENCE, FLAT)]
    means = [outputs[0].mean((2, 3)), outputs[1].mean(1), outputs[2]]
    squares = torch.cat(
        [((mean - vectors[labels]) ** 2).flatten() for mean, vectors in zip(means, objective.class_vectors, strict=True)]
    )
    torch.testing.assert_close(objective.loss(tuple(outputs), labels), squares.mean())


def test_of_vectors_pooled_labels_are_the_full_ones() -> None:
    full, pooled = synthetic(FLAT), synthetic(FLAT, target="pooled")
    assert torch.equal(full.class_vectors[0], pooled.class_vectors[0])
    outputs, labels = (torch.rand(4, 50, requires_grad=True),), torch.tensor([0, 5, 2, 2])
    assert torch.equal(full.loss(outputs, labels), pooled.loss(outputs, labels))


def test_pooled_labels_need_less_memory() -> None:
    bytes_of_map = 4 * 3 * 4 * 4
    assert synthetic(MAP).memory(bytes_of_map).fixed == 6 * bytes_of_map
    assert synthetic(MAP, target="pooled").memory(bytes_of_map).fixed == 6 * 4 * 3


def test_synthetic_labels_classify_nothing() -> None:
    assert synthetic(FLAT).num_correct((torch.zeros(2, 50),), torch.tensor([0, 1])) is None


@pytest.mark.parametrize(("ignored", "classes"), [(-100, 6), (-100, 120), (-1, 6), (3, 6)])
@pytest.mark.parametrize("target", ["full", "pooled"])
def test_samples_whose_label_is_left_out_do_not_count(ignored: int, classes: int, target: Any) -> None:
    objective = synthetic(MAP, FLAT, classes=classes, target=target, ignored=ignored)
    labels = torch.tensor([0, ignored, 2, 5, ignored, 1, ignored, ignored])
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.rand(8, *spec.shape, generator=generator).requires_grad_() for spec in (MAP, FLAT)]
    counted = (labels != ignored).nonzero()[:, 0]
    plain = objective.loss(tuple(output[counted] for output in outputs), labels[counted])
    expected = torch.autograd.grad(plain, outputs)
    # Of two samples at a time, the last two of which are left out.
    parts = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    shares = objective.shares(labels, parts)
    assert shares == [0.25, 0.5, 0.25, 0.0]
    assert [objective.count(labels[part]) for part in parts] == [1, 2, 1, 0]
    for pieces in ([slice(0, 8)], parts[:3]):
        weights = [1.0] if len(pieces) == 1 else shares
        losses = [
            objective.loss(tuple(output[part] for output in outputs), labels[part]) * weight
            for part, weight in zip(pieces, weights, strict=False)
        ]
        torch.testing.assert_close(sum(losses), plain)
        for found, wanted in zip(torch.autograd.grad(sum(losses), outputs), expected, strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(found, wanted)


def test_where_class_vectors_are_inputs_every_sample_has_a_class() -> None:
    objective, parts = synthetic(FLAT, takes_all=True), [slice(0, 3)]
    assert objective.shares(torch.tensor([0, 5, 1]), parts) == [1.0]
    with pytest.raises(DataError, match=r"label -100 is none of the 6 classes, and --parallel-sil learns .*; leave the samples"):
        objective.shares(torch.tensor([0, -100, 1]), parts)
