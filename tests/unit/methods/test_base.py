"""Methods: their programs of visits and sweeps, and the objectives of partitions."""

from typing import Any

import pytest
import torch

from helpers.tasks import classification
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import DataError
from lowmem_pnn.methods import Sweep, SyntheticLabels, TaskObjective, Visit, evaluation_visits, make_method
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.targets import Targets
from lowmem_pnn.tasks.classification import Classification

CPU = torch.device("cpu")
FLAT = TensorSpec((50,), torch.float32)

TASK = classification()


def config(**options: Any) -> FitConfig:
    return configure(max_gpu_mem="1GB", model="mlp:4-4", data="digits", **options)


def test_pnn_trains_a_partition_writes_its_outputs_once_and_goes_on() -> None:
    method = make_method(config(epochs=(3, 1, 2)))
    assert method.visits(3, ["train", "val"]) == [
        Visit("learn", 0, "train", 3), Visit("emit", 0, "train"), Visit("emit", 0, "val"),
        Visit("learn", 1, "train", 1), Visit("emit", 1, "train"), Visit("emit", 1, "val"),
        Visit("learn", 2, "train", 2),
    ]  # fmt: skip
    assert make_method(config()).visits(1, ["train"]) == [Visit("learn", 0, "train", 10)]


def test_independent_partitions_write_nothing_and_learn_from_synthetic_labels() -> None:
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
    assert isinstance(method.objective(0, 1, (FLAT,), TASK), TaskObjective)


def test_only_the_last_partition_of_pnn_learns_the_true_labels() -> None:
    method = make_method(config(kappa=(2.0, 3.0)))
    kinds = [method.objective(number, 3, (FLAT,), TASK) for number in range(3)]
    assert [type(kind) for kind in kinds] == [SyntheticLabels, SyntheticLabels, TaskObjective]
    vectors = []
    for kind in kinds[:2]:
        kind.prepare(CPU)
        assert isinstance(kind, SyntheticLabels)
        vectors.append(kind.class_vectors[0])
    # Each boundary has class vectors of its own, and its own kappa.
    assert not torch.equal(vectors[0] / 2, vectors[1] / 3)
    assert vectors[0].max() < 2 < vectors[1].max() < 3


def test_no_partition_of_pnn_learns_from_labels_that_are_left_out() -> None:
    for ignored in (None, 1):
        task = Classification(Targets("class", 2, ignored=ignored))
        labels = torch.tensor([0, -100 if ignored is None else ignored, 0])
        for number in range(3):
            assert make_method(config()).objective(number, 3, (FLAT,), task).count(labels) == 2
    with pytest.raises(DataError, match="label -100 is none of the 2 classes"):
        make_method(config(parallel_sil=True)).objective(0, 3, (FLAT,), TASK).shares(torch.tensor([0, -100]), [slice(0, 2)])


def test_evaluation_sends_samples_through_all_partitions() -> None:
    assert evaluation_visits(2) == [Visit("emit", 0, "test"), Visit("emit", 1, "test")]


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
