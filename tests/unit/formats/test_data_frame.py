"""Data frames as data: what columns are, as in a file of the same table, and what cannot be used, in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_iris

from helpers.datasets import everything
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.workload.inputs import open_data, python_inputs

FRAME = pd.DataFrame(
    {
        "age": [34, 27, -30, 5],
        "city": pd.Categorical(["Bern", "Riga", "Bern", "Bern"], categories=["Oslo", "Bern", "Riga"]),
        "known": [True, False, True, True],
        "price": np.array([12.5, 11.0, 10.1, 0.1]),
    },
    index=[7, 7, 3, 1],
)


def opened(train: Any, val: Any = None, test: Any = None, **options: Any) -> Any:
    given = {"val_fraction": 0, "test_fraction": 0, "normalize": "none", **options}
    config = configure(
        max_gpu_mem="100MB", model="python:Linear", data=f"python:{type(train).__name__}", method="exact", device="cpu", **given
    )
    return python_inputs(lambda: torch.nn.Linear(5, 1), train, val, test)(config)


def test_frame_is_as_its_file(tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "a.csv", index=False)
    config = configure(
        max_gpu_mem="100MB", model="mlp:5-1", data=f"csv:{tmp_path / 'a.csv'}", val_fraction=0, test_fraction=0, device="cpu",
        target="price", normalize="none", method="exact",
    )  # fmt: skip
    (_, of_file, _, _), (_, of_frame, _, _) = open_data(config), opened(FRAME, target="price")
    assert of_frame.preparation == of_file.preparation
    assert (
        of_frame.preprocessing == of_file.preprocessing == "numbers of columns age, one-hot words of columns city (2), known (2)"
    )
    for own, other in zip(everything(of_frame.train), everything(of_file.train), strict=True):
        assert torch.equal(own, other)


def test_codes_that_python_takes_for_numbers_are_words() -> None:
    _, dataset, _, _ = opened(FRAME.assign(city=["1_2", "1_3", "12", "13"]), target="price")
    assert dataset.preparation["columns"]["city"] == ["12", "13", "1_2", "1_3"]


@pytest.mark.parametrize("targets", [FRAME.price, FRAME[["price"]], FRAME.price.tolist(), FRAME.price.to_numpy()[:, None]])
def test_pair_with_words_is_a_table(targets: Any) -> None:
    _, dataset, _, _ = opened((FRAME.drop(columns="price"), targets))
    x, y = everything(dataset.train)
    assert x.tolist() == [[34, 1, 0, 0, 1], [27, 0, 1, 1, 0], [-30, 1, 0, 0, 1], [5, 1, 0, 0, 1]]
    assert torch.equal(y.flatten(), torch.tensor(FRAME.price.to_numpy(), dtype=torch.float32))


def test_pair_of_numbers_stays_as_it_is() -> None:
    _, dataset, _, _ = opened((FRAME[["age", "price"]], FRAME.known.astype(int)))
    assert dataset.preparation == {"frame_columns": ["age", "price"]}
    with pytest.raises(
        DataError, match=r"part: column 1 is 'price', and 'age' in the training data; give its columns, in the same"
    ):
        opened((FRAME[["age", "price"]], FRAME.known.astype(int)), test=(FRAME[["price", "age"]], FRAME.known.astype(int)))
    assert dataset.preprocessing == "float64 to float32"


def test_words_to_predict_are_classes_that_parts_share() -> None:
    data = load_iris(as_frame=True)
    names = pd.Series(data.target_names[data.target])
    _, dataset, splits, _ = opened(
        (data.data, names), val=(data.data[50:150], names[50:150]), test=(data.data[100:], list(names[100:]))
    )
    assert dataset.classes == ("setosa", "versicolor", "virginica")
    assert set(everything(splits["val"])[1].tolist()) == {1, 2}
    assert set(everything(splits["test"])[1].tolist()) == {2}
    assert torch.equal(everything(splits["test"])[0], torch.tensor(data.data[100:].to_numpy(), dtype=torch.float32))


def test_data_sets_of_scikit_learn() -> None:
    for frame in (False, True):
        _, dataset, _, _ = opened(load_iris(as_frame=frame))
        assert (len(dataset.train), dataset.num_classes, dataset.sample_shape) == (150, 3, (4,))


def test_rows_that_cannot_be_used_are_left_out() -> None:
    frame = FRAME.assign(age=FRAME.age.astype("Int64").where([True, True, False, True]))
    _, dataset, _, _ = opened(frame, target="price", skip_broken=True)
    assert len(dataset.train) == 3
    assert dataset.skipped == {"row 2 of python:DataFrame (training part)": "has no value in column 'age'"}


WHERE = "python:DataFrame (training part)"
FEATURES = FRAME.drop(columns="price")


@pytest.mark.parametrize(
    ("train", "options", "text"),
    [
        (FRAME, {}, "data from Python needs --target COLUMN; its columns are age, city, known, price"),
        (FRAME, {"target": "prize"}, f"{WHERE} has no column 'prize'; did you mean 'price'?"),
        (FRAME[["price"]], {"target": "price"}, f"{WHERE}: all of its columns are targets; leave one out of --target"),
        (FRAME[:0], {"target": "price"}, f"{WHERE} holds 0 rows; give at least 1"),
        (
            FRAME.assign(age=[1, 2, None, 4]),
            {"target": "price"},
            f"{WHERE}: row 2 has no value in column 'age'; 1 of 4 rows cannot be used; fill them in, or leave them out (--skip-broken)",
        ),
        (
            FRAME.assign(age=[[1], [2], [3], [4]]),
            {"target": "price"},
            f"{WHERE}: column 'age' holds a list in row 0; give numbers or words alone, or leave it out",
        ),
        (pd.concat([FRAME, FRAME], axis=1), {"target": "price"}, f"{WHERE} has two columns 'age'; give each a name of its own"),
        ((FEATURES, [1.0, 2.0]), {}, "python:tuple (training part) has 4 rows and 2 targets; give one for each row"),
        (
            (FEATURES, np.zeros((4, 1, 1))),
            {},
            "python:tuple (training part) has targets of shape (4, 1, 1) beside a table; give (N,) or (N, T)",
        ),
        (
            (FRAME, FRAME.price),
            {"target": "price"},
            "--target has no effect here: it needs data with columns (csv:, parquet:, jsonl:, hfdata:, or from Python a data frame alone)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(train: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        opened(train, **options)
    assert str(caught.value) == text


def test_parts_have_the_words_of_the_training_data() -> None:
    with pytest.raises(DataError, match=r"\(test part\): row 0 holds 'Oslo' in column 'city', which the training data has not"):
        opened(FRAME, test=FRAME.assign(city="Oslo"), target="price")
