"""Models and data as they are given: which parts a run has, and what they are made of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.datasets import everything, save
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.workload.inputs import open_data, python_inputs
from lowmem_pnn.workload.trained import trained_source


def arrays(**sizes: int) -> dict[str, np.ndarray]:
    """Parts of these sizes, whose sample i is of class i."""
    made = {}
    for name, size in sizes.items():
        made[f"x_{name}"], made[f"y_{name}"] = np.arange(float(size)).reshape(-1, 1), np.arange(size)
    return made


def config(data: str, **options: Any) -> Any:
    return configure(max_gpu_mem="100MB", model="mlp:1-40", data=data, device="cpu", **options)


def test_a_validation_part_takes_the_place_of_the_fraction(tmp_path: Path) -> None:
    spec = save(tmp_path / "a.npz", **arrays(train=20, val=5, test=8))
    _, dataset, splits, _ = open_data(config(spec, train_limit=10))
    assert {name: len(split) for name, split in splits.items()} == {"train": 10, "val": 5, "test": 8}
    assert everything(splits["val"])[1].tolist() == list(range(5))
    assert dataset.num_classes == 20
    without = open_data(config(spec, val_fraction=0))[2]
    assert {name: len(split) for name, split in without.items()} == {"train": 20, "test": 8}
    with pytest.raises(
        ConfigError,
        match=r"--val-fraction 0.2 has no effect here: data .* has a validation part of 5 samples; leave the option out",
    ):
        open_data(config(spec, val_fraction=0.2))


def test_without_a_validation_part_the_fraction_is_taken(tmp_path: Path) -> None:
    spec = save(tmp_path / "a.npz", **arrays(train=20))
    splits = open_data(config(spec, val_fraction=0.2))[2]
    assert {name: len(split) for name, split in splits.items()} == {"train": 16, "val": 4}


def test_a_validation_part_needs_both_arrays(tmp_path: Path) -> None:
    parts = arrays(train=20, val=5)
    del parts["y_val"]
    with pytest.raises(ConfigError, match=r"a.npz lacks y_val; it holds x_train, x_val, y_train; save"):
        open_data(config(save(tmp_path / "a.npz", **parts)))


def test_a_test_limit_is_a_choice_of_the_seed(tmp_path: Path) -> None:
    spec = save(tmp_path / "a.npz", **arrays(train=20, test=40))
    chosen = [everything(open_data(config(spec, test_limit=10, seed=seed))[2]["test"])[1].tolist() for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert [len(set(numbers)) for numbers in chosen] == [10, 10, 10]
    assert max(chosen[0]) > 20
    assert everything(open_data(config(spec, test_limit=99))[2]["test"])[1].tolist() == list(range(40))


def test_parts_that_are_given_apart_take_the_place_of_the_data_sets_own(tmp_path: Path) -> None:
    spec = save(tmp_path / "a.npz", **arrays(train=20, val=5, test=8))
    apart = torch.zeros(3, 1), torch.arange(3)
    _, own, _, _ = python_inputs("mlp:1-40", spec, None, None)(config(spec))
    _, dataset, splits, _ = python_inputs("mlp:1-40", spec, apart, apart)(config(spec, val_fraction=0, test_limit=2))
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "val": 3, "test": 2}
    assert dataset.fingerprint != own.fingerprint


def test_broken_samples_of_all_parts_are_counted(tmp_path: Path) -> None:
    x = torch.zeros(6, 1)
    x[4] = float("nan")
    _, dataset, splits, _ = python_inputs("mlp:1-40", (x, torch.arange(6)), (x, torch.arange(6)), (x, torch.arange(6)))(
        config("python:tuple", skip_broken=True)
    )
    assert {name: len(split) for name, split in splits.items()} == {"train": 5, "val": 5, "test": 5}
    assert dataset.skipped_samples == {
        "count": 3,
        "names": [f"sample 4 of python:tuple ({part} part)" for part in ("training", "validation", "test")],
    }


def test_a_model_knows_which_weights_training_begins_or_began_with() -> None:
    options: dict[str, Any] = {"max_gpu_mem": "2GB", "model": "googlenet", "data": "digits", "device": "cpu"}
    for weights, expected in (("default", True), ("none", False)):
        asked = configure(**options, weights=weights)
        for source in (open_data(asked).source, trained_source(asked, None, 10, ""), trained_source(asked, "googlenet", 10, "")):
            with torch.device("meta"):
                assert source.build().transform_input == expected
    with torch.device("meta"):
        assert not trained_source(configure(**{**options, "model": "resnet18"}), "googlenet", 10, "").build().transform_input


@pytest.mark.parametrize("data", ["digits", "cifar10", "text:book.txt"])
def test_nothing_is_broken_in_data_that_are_checked_otherwise(data: str) -> None:
    with pytest.raises(ConfigError, match=r"--skip-broken has no effect here: it needs data of your own \(imagefolder:"):
        config(data, skip_broken=True)


def test_a_data_set_that_is_made_already_leaves_out_nothing(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nfrom lowmem_pnn.sources.datasets import make_dataset\n"
        "def load():\n    return make_dataset((torch.zeros(4, 1), torch.arange(4)), name='x')\n"
    )
    with pytest.raises(
        ConfigError, match=r"--skip-broken has no effect here: '.*own.py:load' returns a Dataset that is made already"
    ):
        open_data(config(f"{tmp_path}/own.py:load", skip_broken=True))


FLOATS, BYTES = torch.rand(8, 3) * 255, torch.zeros(8, 3, dtype=torch.uint8)
CLASSES = torch.arange(8) % 2
LAST_NAN = torch.where(torch.arange(24).reshape(8, 3) == 23, torch.nan, FLOATS)


def opened(train: Any, val: Any, test: Any = None, **options: Any) -> Any:
    data = train if isinstance(train, str) else "python:tuple"
    given = configure(max_gpu_mem="100MB", model="python:net", data=data, device="cpu", **options)
    return python_inputs(lambda: torch.nn.Linear(3, 3), train, val, test)(given)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    ("val", "message"),
    [
        ((BYTES, CLASSES), r"presented as .*uint8 / 255.*; store both alike"),
        ((FLOATS.long(), CLASSES), r"\(3,\) (torch.)?int64"),
        ((LAST_NAN, CLASSES), r"sample 7 of python:tuple \(validation part\) holds NaN; repair it|sample 7 of npz:.* holds NaN"),
        ((FLOATS, CLASSES - 1), r"has label -1, outside 0 to"),
        (({"a": FLOATS, "b": FLOATS}, CLASSES), r"hold different tensors|of other tensors than the training data"),
    ],
)  # fmt: skip
def test_parts_of_python_are_held_against_the_training_data(named: bool, val: Any, message: str, tmp_path: Path) -> None:
    train = save(tmp_path / "a.npz", x_train=FLOATS.numpy(), y_train=CLASSES.numpy()) if named else (FLOATS, CLASSES)
    for parts in ((val, None), (None, val)):
        with pytest.raises(ConfigError, match=message.replace("(validation", "(validation" if parts[0] else "(test")):
            opened(train, *parts)


def test_classes_of_parts_of_python_count_and_of_named_data_are_known(tmp_path: Path) -> None:
    assert opened((FLOATS, CLASSES), (FLOATS, CLASSES + 1)).dataset.num_classes == 3
    spec = save(tmp_path / "a.npz", x_train=FLOATS.numpy(), y_train=CLASSES.numpy())
    for labels in (CLASSES + 1, (CLASSES + 1).tolist()):
        with pytest.raises(ConfigError, match=r"\(validation part\) has classes up to number 2, and the training data up to 1"):
            opened(spec, (FLOATS, labels))
    pair = {"a": FLOATS, "b": FLOATS}
    assert opened((pair, CLASSES), (pair, CLASSES + 1)).dataset.num_classes == 3


def test_a_validation_part_of_python_stays_whatever_the_fraction() -> None:
    splits = opened((FLOATS, CLASSES), (FLOATS[:4], CLASSES[:4]), val_fraction=0).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "val": 4}


def test_what_targets_are_the_training_data_says(tmp_path: Path) -> None:
    values = torch.arange(8) / 2
    for other in (torch.tensor([3.0, 5.0]), torch.tensor([3, 5]), torch.tensor([2000.0, 5.0])):
        dataset = opened((FLOATS, values), (FLOATS[:2], other), (FLOATS[:2], other)).dataset
        assert dataset.targets.kind == "values"
        spec = save(tmp_path / "a.npz", x_train=FLOATS.numpy(), y_train=values, x_test=FLOATS[:2].numpy(), y_test=other)
        splits = opened(spec, (FLOATS[:2], other)).splits
        assert everything(splits["val"])[1].tolist() == everything(splits["test"])[1].tolist() == other.tolist()
        apart = save(tmp_path / "b.npz", x=FLOATS[:2].numpy(), y=other.numpy())
        assert everything(opened((FLOATS, values), None, None, val_data=apart).splits["val"])[1].tolist() == other.tolist()
    several = (torch.arange(24).reshape(8, 3) % 5 > 1).float()
    assert opened((FLOATS, several), (FLOATS[:2], torch.eye(3)[:2])).dataset.targets.kind == "labels"
