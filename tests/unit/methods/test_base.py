"""Methods: which visits they make, and what partitions learn."""

from typing import Any

import pytest
import torch
from torch import nn

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.methods import Labels, Sweep, SyntheticLabels, Visit, evaluation_visits, make_method
from lowmem_pnn.methods.sil import draw_class_vectors
from lowmem_pnn.model.chain import TensorSpec

CPU = torch.device("cpu")
FLAT, MAP, TOKENS = TensorSpec((50,), torch.float32), TensorSpec((3, 4, 4), torch.float32), TensorSpec((6,), torch.int64)


def config(**options: Any) -> FitConfig:
    return configure(max_gpu_mem="1GB", model="mlp:4-4", data="digits", **options)


def synthetic(*specs: TensorSpec, seed: int = 0, kappa: float = 10.0, classes: int = 6, **options: Any) -> SyntheticLabels:
    objective = SyntheticLabels(specs, classes, kappa, seed, **options)
    objective.prepare(CPU)
    return objective


def test_pnn_trains_a_partition_writes_its_outputs_once_and_goes_on() -> None:
    method = make_method(config(epochs=(3, 1, 2)))
    assert method.visits(3, ["train", "val"]) == [
        Visit("learn", 0, "train", 3), Visit("emit", 0, "train"), Visit("emit", 0, "val"),
        Visit("learn", 1, "train", 1), Visit("emit", 1, "train"), Visit("emit", 1, "val"),
        Visit("learn", 2, "train", 2),
    ]  # fmt: skip
    assert make_method(config()).visits(1, ["train"]) == [Visit("learn", 0, "train", 10)]


def test_partitions_that_train_apart_write_nothing_and_learn_from_labels() -> None:
    method = make_method(config(epochs=(3, 1, 2), parallel_sil=True))
    assert method.partitions_are_independent
    assert method.visits(3, ["train", "val"]) == [
        Visit("learn", 0, "train", 3),
        Visit("learn", 1, "train", 1, from_synthetic_labels=True),
        Visit("learn", 2, "train", 2, from_synthetic_labels=True),
    ]
    assert not any(make_method(config(method=name)).partitions_are_independent for name in ("pnn", "exact", "backprop"))


def test_backprop_is_one_partition_with_the_true_labels() -> None:
    method = make_method(config(method="backprop", epochs=4))
    assert method.num_partitions == 1
    assert method.visits(1, ["train", "val"]) == [Visit("learn", 0, "train", 4)]
    assert isinstance(method.objective(0, 1, (FLAT,), 5), Labels)


def test_only_the_last_partition_of_pnn_learns_the_true_labels() -> None:
    method = make_method(config(kappa=(2.0, 3.0)))
    kinds = [method.objective(number, 3, (FLAT,), 6) for number in range(3)]
    assert [type(kind) for kind in kinds] == [SyntheticLabels, SyntheticLabels, Labels]
    codes = []
    for kind in kinds[:2]:
        kind.prepare(CPU)
        assert isinstance(kind, SyntheticLabels)
        codes.append(kind.class_vectors[0])
    # Each boundary has its own codes, and its own kappa.
    assert not torch.equal(codes[0] / 2, codes[1] / 3)
    assert codes[0].max() < 2 < codes[1].max() < 3


def test_evaluation_sends_samples_through_all_partitions() -> None:
    assert evaluation_visits(2) == [Visit("emit", 0, "test"), Visit("emit", 1, "test")]


def test_codes_are_one_for_each_class_uniform_from_0_to_kappa() -> None:
    [codes] = synthetic(TensorSpec((20_000,), torch.float32), kappa=4.0).class_vectors
    assert codes.shape == (6, 20_000)
    assert 0 <= float(codes.min()) < 0.001
    assert 3.999 < float(codes.max()) < 4
    assert float(codes.mean()) == pytest.approx(2, abs=0.02)
    assert float(codes.std()) == pytest.approx(4 / 12**0.5, abs=0.02)
    assert len({tuple(row) for row in codes[:, :5].tolist()}) == 6


DISTRIBUTIONS: list[Any] = ["uniform", "normal", "orthogonal", "sparse"]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(
    ("classes", "shape"), [(6, (50,)), (5, (3, 4, 4)), (7, (7,)), (40, (3, 2)), (9, (1,)), (4, ()), (1, (8,))]
)
def test_codes_have_the_shape_of_what_is_compared_with_them(distribution: Any, classes: int, shape: tuple[int, ...]) -> None:
    codes = draw_class_vectors([shape, (11,)], classes, 3.0, 0, distribution)
    assert [(tuple(one.shape), one.dtype) for one in codes] == [
        ((classes, *shape), torch.float32),
        ((classes, 11), torch.float32),
    ]
    assert all(bool(one.isfinite().all()) for one in codes)
    # What is drawn for one tensor does not depend on those after it.
    assert torch.equal(draw_class_vectors([shape], classes, 3.0, 0, distribution)[0], codes[0])
    # Kappa is a scale, and nothing else.
    torch.testing.assert_close(draw_class_vectors([shape], classes, 6.0, 0, distribution)[0], 2 * codes[0])


@pytest.mark.parametrize("distribution", ["normal", "orthogonal"])
@pytest.mark.parametrize(("classes", "shape"), [(6, (20_000,)), (10, (8, 40, 40)), (2_000, (60,))])
def test_normal_and_orthogonal_codes_have_the_mean_and_the_deviation_of_uniform_ones(
    distribution: Any, classes: int, shape: tuple[int, ...]
) -> None:
    kappa = 4.0
    [found] = draw_class_vectors([shape], classes, kappa, 0, distribution)
    [uniform] = draw_class_vectors([shape], classes, kappa, 1, "uniform")
    # Four standard errors of a mean of so many elements, and as much for the deviation.
    error = 4 * kappa / (12 * found.numel()) ** 0.5
    for codes in (found, uniform):
        assert float(codes.mean()) == pytest.approx(kappa / 2, abs=error)
        assert float(codes.std()) == pytest.approx(kappa / 12**0.5, abs=error)


@pytest.mark.parametrize(("classes", "shape"), [(6, (50,)), (10, (3, 4, 4)), (8, (8,))])
def test_orthogonal_codes_are_equally_far_apart(classes: int, shape: tuple[int, ...]) -> None:
    kappa = 4.0
    [codes] = draw_class_vectors([shape], classes, kappa, 3, "orthogonal")
    deviations = codes.flatten(1) - kappa / 2
    expected = deviations.shape[1] * kappa**2 / 12
    torch.testing.assert_close(deviations @ deviations.T, expected * torch.eye(classes), rtol=1e-5, atol=1e-4)
    distances = torch.pdist(deviations)
    torch.testing.assert_close(distances, torch.full_like(distances, (2 * expected) ** 0.5))


def test_of_more_classes_than_elements_the_elements_are_orthogonal() -> None:
    [codes] = draw_class_vectors([(5,)], 30, 4.0, 0, "orthogonal")
    deviations = codes - 2
    torch.testing.assert_close(deviations.T @ deviations, 30 * 16 / 12 * torch.eye(5), rtol=1e-5, atol=1e-4)
    assert len({tuple(row) for row in codes.tolist()}) == 30


@pytest.mark.parametrize(("classes", "elements"), [(6, 20_000), (2_000, 60)])
def test_a_fifth_of_the_elements_of_sparse_codes_is_kappa(classes: int, elements: int) -> None:
    [codes] = draw_class_vectors([(elements,)], classes, 7.0, 0, "sparse")
    assert set(codes.unique().tolist()) == {0.0, 7.0}
    assert float((codes == 7).float().mean()) == pytest.approx(0.2, abs=4 * (0.2 * 0.8 / codes.numel()) ** 0.5)


def test_codes_follow_from_the_seed_alone() -> None:
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
    squares = torch.cat([codes[labels].flatten() ** 2 for codes in objective.class_vectors])
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
    assert [tuple(codes.shape) for codes in objective.class_vectors] == [(6, 3), (6, 7), (6, 50)]
    labels = torch.tensor([0, 2, 0])
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.rand(3, *spec.shape, generator=generator).requires_grad_() for spec in (MAP, SEQUENCE, FLAT)]
    means = [outputs[0].mean((2, 3)), outputs[1].mean(1), outputs[2]]
    squares = torch.cat(
        [((mean - codes[labels]) ** 2).flatten() for mean, codes in zip(means, objective.class_vectors, strict=True)]
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


def test_labels_are_cross_entropy_and_count_right_answers() -> None:
    scores, labels = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 5
    assert torch.equal(Labels().loss((scores,), labels), nn.functional.cross_entropy(scores, labels))
    assert Labels().num_correct((scores,), labels) == int((scores.argmax(1) == labels).sum())
    assert synthetic(FLAT).num_correct((torch.zeros(2, 50),), labels[:2]) is None


def steps(visits: tuple[Visit, ...]) -> list[str]:
    return [f"{visit.action} {visit.partition}" for visit in visits]


def test_exact_goes_forward_through_all_partitions_and_back() -> None:
    (sweep,) = make_method(config(method="exact", epochs=3, batch_size=16)).program(3, ["train", "val"])
    assert isinstance(sweep, Sweep)
    assert (sweep.epochs, sweep.batch_size, sweep.learners, sweep.fresh_state) == (3, 16, (0, 1, 2), False)
    assert steps(sweep.visits) == ["emit 0", "emit 1", "backpropagate 2", "backpropagate 1", "backpropagate 0"]
    assert [visit.returns_input_gradient for visit in sweep.visits[2:]] == [True, True, False]
    assert not any(visit.keeps_gradients for visit in sweep.visits)


def test_clipping_steps_only_when_all_gradients_are_there() -> None:
    (sweep,) = make_method(config(method="exact", clip_norm=1.0)).program(2, ["train"])
    assert isinstance(sweep, Sweep)
    assert steps(sweep.visits) == ["emit 0", "backpropagate 1", "backpropagate 0", "step 0", "step 1"]
    assert all(visit.keeps_gradients for visit in sweep.visits[1:3])


def test_a_sweep_is_shuffled_as_its_partitions_are_and_a_recovery_as_the_last_one() -> None:
    sweeps = [
        make_method(config(**options)).program(3, ["train"])[-1]
        for options in (
            {"method": "exact"},
            {"method": "exact", "shuffle": False},
            {"recovery_epochs": 1, "shuffle": (True, True, False)},
        )
    ]
    assert [isinstance(sweep, Sweep) and sweep.shuffle for sweep in sweeps] == [True, False, False]


@pytest.mark.parametrize(
    ("recover", "expected"),
    [
        (None, ["emit 0", "emit 1", "backpropagate 2", "backpropagate 1", "backpropagate 0"]),
        ((3,), ["emit 0", "emit 1", "backpropagate 2"]),
        ("2", ["emit 0", "emit 1", "backpropagate 2", "backpropagate 1"]),
        ("all", ["emit 0", "emit 1", "backpropagate 2", "backpropagate 1", "backpropagate 0"]),
    ],
)
def test_recovery_goes_back_to_the_first_partition_that_learns(recover: Any, expected: list[str]) -> None:
    method = make_method(config(recovery_epochs=4, recover=recover, batch_size=(8, 16, 32)))
    *before, sweep = method.program(3, ["train"])
    assert before == method.visits(3, ["train"])
    assert isinstance(sweep, Sweep)
    assert (sweep.epochs, sweep.batch_size, sweep.phase, sweep.fresh_state) == (4, 32, "recovery", True)
    assert steps(sweep.visits) == expected
    assert sweep.learners == {None: (0, 1), (3,): (2,), "2": (1,), "all": (0, 1, 2)}[recover]
