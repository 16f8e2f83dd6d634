"""Tables as data: what columns are, what is predicted, and how what cannot be used is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.datasets import everything
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.formats.table_file import TableFile
from lowmem_pnn.formats.tables import TableSchema, open_table
from lowmem_pnn.sources.targets import TargetOptions
from lowmem_pnn.workload.inputs import open_data

PRICES = "age,city,price\n34,Bern,12.5\n27,Riga,11.0\n-3e1,Bern,10.5\n"


def write(folder: Path, text: str, name: str = "a.csv") -> str:
    (folder / name).write_text(text)
    return f"csv:{folder / name}"


def opened(spec: str, model: str = "resnet18", **options: Any) -> Any:
    given = {"val_fraction": 0, "test_fraction": 0, "normalize": "none", "target": "price", **options}
    return open_data(configure(max_gpu_mem="100MB", model=model, data=spec, device="cpu", **given))


def samples(spec: str, **options: Any) -> tuple[list[Any], list[Any]]:
    """All samples and targets, in the order of the file."""
    _, dataset, _, _ = opened(spec, "mlp:3-2", **options)
    x, y = everything(dataset.train)
    return x.tolist(), y.tolist()


@pytest.mark.parametrize(
    "text",
    [
        PRICES,
        PRICES.replace(",", ";"),
        PRICES.replace(",", "\t"),
        PRICES.replace(",", ";").replace(".", ","),
        PRICES.replace(",", ";").replace("11.0", "11,0"),
        "\ufeff" + PRICES.replace("\n", "\r\n") + "\r\n",
        PRICES.replace("Bern", '"Bern"').replace("city", '"city"'),
        PRICES.replace(",", " , "),
    ],
    ids=["commas", "semicolons", "tabs", "decimal commas", "both", "from Windows", "quoted", "blanks"],
)
def test_numbers_stay_and_words_are_one_hot(text: str, tmp_path: Path) -> None:
    x, y = samples(write(tmp_path, text))
    assert x == [[34, 1, 0], [27, 0, 1], [-30, 1, 0]]
    assert y == [12.5, 11.0, 10.5]


def test_steps_and_columns_are_said(tmp_path: Path) -> None:
    _, dataset, _, _ = opened(write(tmp_path, PRICES), "mlp:3-1")
    assert dataset.preprocessing == "numbers of columns age, one-hot words of columns city (2)"
    assert dataset.preparation == {"columns": {"age": None, "city": ["Bern", "Riga"]}, "targets": ["price"], "classes": []}
    assert TableSchema.from_dict(dataset.preparation).to_dict() == dataset.preparation
    assert dataset.targets.kind == "values"


@pytest.mark.parametrize(
    ("target", "values", "kind", "classes", "y"),
    [
        ("c", ["no", "yes", "no", "maybe"], "class", ("maybe", "no", "yes"), [1, 2, 1, 0]),
        ("c", ["10", "9", "10", "3"], "class", ("3", "9", "10"), [2, 1, 2, 0]),
        ("c", ["1.0", "2.0", "3.5", "1.0"], "values", (), [1, 2, 3.5, 1]),
        ("c", ["1.0", "2.0", "3.0", "1.0"], "values", (), [1, 2, 3, 1]),
    ],
)
def test_what_is_predicted_is_what_the_target_looks_like(
    target: str, values: list[str], kind: str, classes: Any, y: list[Any], tmp_path: Path
) -> None:
    spec = write(tmp_path, "a,c\n" + "".join(f"{number},{value}\n" for number, value in enumerate(values)))
    _, dataset, _, _ = opened(spec, "mlp:1-3", target=target)
    assert (dataset.targets.kind, dataset.classes) == (kind, classes)
    assert everything(dataset.train)[1].tolist() == y


def test_the_task_decides_where_it_is_asked_for(tmp_path: Path) -> None:
    spec = write(tmp_path, "a,b,c\n1,0,5\n2,1,6\n3,1,5\n")
    assert samples(spec, target="c", task="regression")[1] == [5, 6, 5]
    assert samples(spec, target="c", task="classification")[1] == [0, 1, 0]
    x, y = samples(spec, target="b,c", task="regression")
    assert (x, y) == ([[1], [2], [3]], [[0, 5], [1, 6], [1, 5]])
    assert samples(write(tmp_path, "a,b,c\n1,0,1\n2,1,1\n"), target="b,c", task="multilabel")[1] == [[0, 1], [1, 1]]


def test_numbers_are_standardised_by_the_training_part(tmp_path: Path) -> None:
    rows = np.random.RandomState(0).rand(200, 2) * [5, 1e-3] + [1e6, 3]
    text = "a,b,k,y\n" + "".join(f"{a},{b},{'uv'[number % 2]},{number % 3}\n" for number, (a, b) in enumerate(rows))
    spec = write(tmp_path, text)
    _, dataset, splits, _ = opened(spec, "mlp:4-3", target="y", normalize=None, val_fraction=0.2, test_fraction=None)
    assert {name: len(split) for name, split in splits.items()} == {"train": 144, "val": 36, "test": 20}
    bare = opened(spec, "mlp:4-3", target="y", val_fraction=0.2, test_fraction=None)[2]
    raw = everything(bare["train"])[0]
    train = everything(splits["train"])[0]
    assert train[:, :2].mean(0).tolist() == pytest.approx([0, 0], abs=0.05)
    assert train[:, :2].std(0).tolist() == pytest.approx([1, 1], abs=0.05)
    assert torch.equal(train[:, 2:], raw[:, 2:])
    mean, std = (torch.tensor(dataset.preparation[name]) for name in ("mean", "std"))
    assert torch.equal(everything(splits["test"])[0], (everything(bare["test"])[0] - mean) / std)
    assert mean.tolist()[2:] + std.tolist()[2:] == [0, 0, 1, 1]
    assert dataset.preprocessing.endswith("numbers standardised by mean and deviation of the training part (preparation)")


def test_a_column_that_float32_keeps_too_coarsely_is_said(tmp_path: Path) -> None:
    rows = "".join(f"{1_700_000_000 + 3600 * hour},{2020 + hour % 2},{hour}.5\n" for hour in range(24))
    _, dataset, _, _ = opened(write(tmp_path, "time,year,price\n" + rows), "mlp:2-1")
    (note,) = dataset.notes
    assert note.endswith(
        "goes from 1700000000 to 1700082800, and float32 keeps it in steps of 128; subtract the lowest to keep it exactly"
    )


def test_other_files_are_read_by_the_columns_of_the_training_data(tmp_path: Path) -> None:
    train = write(tmp_path, "age,city,y\n1,Bern,no\n2,Oslo,yes\n3,Riga,maybe\n")
    other = write(tmp_path, "y,city,note,age\nyes,Riga,x,7\nno,Bern,y,8\n", "b.csv")
    splits = opened(train, "mlp:4-3", target="y", test_data=other)[2]
    x, y = everything(splits["test"])
    assert (x.tolist(), y.tolist()) == ([[7, 0, 0, 1], [8, 1, 0, 0]], [2, 1])
    write(tmp_path, "y;city;age\nyes;Riga;1,250\n", "b.csv")  # of a comma in one number the training data tells nothing
    assert everything(opened(train, "mlp:4-3", target="y", test_data=other)[2]["test"])[0].tolist() == [[1.25, 0, 0, 1]]
    for text, message in (
        ("y,city,age\nyes,Rome,7\n", r"b.csv: line 2 holds 'Rome' in column 'city', which the training data has not; mend it"),
        ("y,city,age\nnever,Riga,7\n", r"b.csv: line 2 holds 'never' in column 'y', a class that the training data has not"),
        ("y,town,age\nno,Riga,7\n", r"b.csv has no column 'city'"),
    ):
        write(tmp_path, text, "b.csv")
        with pytest.raises(ConfigError, match=message):
            opened(train, "mlp:4-3", target="y", test_data=other)
    np.savez(tmp_path / "c.npz", x_train=np.zeros((3, 4)), y_train=np.arange(3))
    with pytest.raises(
        DataError, match=r"csv:.*b.csv is a table, and the training data npz:.*c.npz is none; give data of one kind"
    ):
        open_data(configure(max_gpu_mem="100MB", model="mlp:4-3", data=f"npz:{tmp_path / 'c.npz'}", val_data=other, device="cpu"))


@pytest.mark.parametrize(
    ("text", "message", "left"),
    [
        (
            "a,b,price\n1,,2.5\n2,x,2.5\n",
            r"a.csv: line 2 has no value in column 'b'; 1 of 2 rows cannot be used; fill them in, or",
            1,
        ),
        ("a,b,price\n1,x,2.5\nNA,x,2.5\n", r"a.csv: line 3 has no value in column 'a'; 1 of 2 rows", 1),
        ("a,b,price\n1,x,nan\n3,x,2.5\n", r"a.csv: line 2 has no value in column 'price'; 1 of 2 rows", 1),
        ('a,b,price\n1,"x\ny",2.5\n3,x\n', r"a.csv: line 4 has 2 fields, and the first line 3; 1 of 2 rows", 1),
        (
            "a,b,price\n1,x,2.5\n1e99,x,2.5\n",
            r"a.csv: line 3 holds '1e99' in column 'a', which is too large; mend it, or leave the row",
            1,
        ),
        ("a,b,price\ninf,x,2.5\n1,x,2.5\n", r"a.csv: line 2 holds 'inf' in column 'a', which is too large", 1),
    ],
)
def test_rows_that_cannot_be_used_are_named_or_left_out(text: str, message: str, left: int, tmp_path: Path) -> None:
    spec = write(tmp_path, text)
    with pytest.raises(DataError, match=message):
        opened(spec)
    _, dataset, _, _ = opened(spec, "mlp:2-1", skip_broken=True)
    assert len(dataset.train) == left
    assert dataset.skipped_samples["count"] == 1
    assert dataset.skipped_samples["names"][0].startswith("line ")


def test_what_stands_for_no_number_may_be_a_word(tmp_path: Path) -> None:
    assert samples(write(tmp_path, "land,price\nNA,1.5\nDE,2.5\n"))[0] == [[0, 1], [1, 0]]


@pytest.mark.parametrize("value", ["nan", "?", "high"])
def test_a_target_that_is_no_number_is_left_aside_where_it_is_predicted(value: str, tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text(f"age,price\n3,{value}\n4,2.5\n")
    schema = TableSchema({"age": None}, ("price",), ())
    table = open_table(TableFile(tmp_path / "b.csv", "csv"), None, "any", TargetOptions(), schema=schema, may_lack="values")
    assert table.notes[0].endswith("b.csv are left aside: line 2 has no value in column 'price'")
    assert everything(table.train)[0].tolist() == [[3], [4]]


def test_what_is_missing_goes_by_the_columns_of_the_training_data(tmp_path: Path) -> None:
    train = write(tmp_path, "age,land,y\n1,NA,None\n2,DE,some\n")
    other = write(tmp_path, "age,land,y\n3,NA,None\n4,NA,None\n", "b.csv")
    x, y = everything(opened(train, "mlp:3-2", target="y", test_data=other)[2]["test"])
    assert (x.tolist(), y.tolist()) == ([[3, 0, 1], [4, 0, 1]], [0, 0])
    write(tmp_path, "age,land,y\nold,DE,some\nNA,DE,some\n", "b.csv")
    with pytest.raises(DataError, match=r"b.csv: line 3 has no value in column 'age'; 1 of 2 rows cannot be used"):
        opened(train, "mlp:3-2", target="y", test_data=other)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (PRICES, {"target": None}, r"^data csv:.*a.csv needs --target COLUMN; its columns are age, city, price$"),
        (PRICES, {"target": "prize"}, r"a.csv has no column 'prize'; did you mean 'price'\?$"),
        (PRICES, {"target": "age,city,price"}, r"a.csv: all of its columns are targets; leave one out of --target$"),
        (
            PRICES,
            {"target": "age,city"},
            r"a.csv: of several target columns each is numbers, and 'city' holds words, such as 'Bern'; give",
        ),
        (
            PRICES,
            {"target": "city", "task": "regression"},
            r"a.csv: --task regression needs numbers, and column 'city' holds 'Bern'$",
        ),
        ("", {}, r"a.csv is empty; give a file with a line of names and lines of values$"),
        ("a,price\n", {}, r"a.csv holds 0 rows; give at least 1$"),
        ("1,2\n3,4\n", {}, r"a.csv: line 1 holds numbers \(1, 2\), and should name the columns; add a line of names$"),
        (",price\n1,2.5\n", {}, r"a.csv: column 1 has no name; give it one, or leave it out \(pandas: to_csv\(index=False\)\)$"),
        ("a,a,price\n1,2,2.5\n", {}, r"a.csv has two columns 'a'; give each a name of its own$"),
        ("a,price\n,2.5\n", {}, r"a.csv: no row can be used, such as line 2, which has no value in column 'a'$"),
        (
            "a,price\n" + "".join(f"{number},2.5\n" for number in range(150)) + "abc,2.5\n",
            {},
            r"a.csv: column 'a' holds more than 100 different values, and words, such as 'abc' in line 152: it is neither numbers nor",
        ),
        (
            "a,price\n" + "".join(f"1,{number}\n" for number in range(150)),
            {},
            r"a.csv: column 'price' holds 150 different whole numbers, which may be values or classes; say which: --task regression or",
        ),
        (
            "a,price\n1,-1\n2,0\n3,1\n",
            {"ignore_index": -1},
            r"^--ignore-index -1 has no meaning for a table, whose classes get numbers of their own; leave the option out, and the rows",
        ),
        (
            "a;price\n1,234;2.5\n",
            {},
            r"a.csv holds '1,234' \(line 2\) and '2.5' \(line 2\): whether a comma stands for the point, or parts thousands, is",
        ),
        (
            "a\tprice\n1,234\t2\n999\t3\n",
            {},
            r"a.csv holds '1,234' \(line 2\): whether .* is not clear; write numbers with a point, and without commas$",
        ),
        (
            "a;price\n1.234;2,5\n",
            {},
            r"a.csv holds '2,5' \(line 2\) and '1.234' \(line 2\): whether a comma stands for the point, or parts thousands, is",
        ),
        (PRICES, {"image_size": 8}, r"--image-size has no effect here: data 'csv:.*' is a table; leave it out$"),
        (
            PRICES,
            {"augment": "basic"},
            r"--augment basic is for images \(C, H, W\), and the samples of data a are \(3,\); leave it out$",
        ),
        (
            PRICES,
            {"normalize": "imagenet"},
            r"--normalize imagenet has 3 means, and the samples of data a have shape \(3,\), without",
        ),
    ],
)
def test_what_is_no_table_is_said_in_a_line(text: str, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        opened(write(tmp_path, text), "mlp:3-1", **options)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,price\n\xff\xfe,2\n")
    with pytest.raises(DataError, match=r"a.csv is no text in UTF-8 \(invalid start byte, byte \d+\); store it in UTF-8$"):
        opened(f"csv:{tmp_path / 'a.csv'}")
    with pytest.raises(DataError, match=r"there is no file .*/b.csv; give csv:FILE$"):
        opened(f"csv:{tmp_path / 'b.csv'}")
    with pytest.raises(ConfigError, match=r"data set 'csv:' says no place; write csv:FILE$"):
        opened("csv:")
    with pytest.raises(
        ConfigError, match=r"--target has no effect here: it needs data with columns \(csv:, parquet:, jsonl:, hfdata:, or"
    ):
        opened("digits")


def test_parquet_is_read_as_csv_is(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {"age": [34, 27, None], "city": ["Bern", "Riga", "Bern"], "price": [12.5, 11.0, 10.5]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    spec = f"parquet:{tmp_path / 'a.parquet'}"
    assert samples(spec, skip_broken=True) == ([[34, 1, 0], [27, 0, 1]], [12.5, 11.0])
    with pytest.raises(DataError, match=r"a.parquet: row 3 has no value in column 'age'; 1 of 3 rows cannot be used"):
        opened(spec)
    table = pyarrow.table({"__index_level_0__": [2, 0], "a": [1, 2], "price": [2.5, 3.5]})
    parquet.write_table(table, tmp_path / "a.parquet")  # as pandas stores the index of rows that were shuffled or chosen
    assert samples(spec) == ([[1], [2]], [2.5, 3.5])
    schema = TableSchema({"__index_level_0__": None, "a": None}, ("price",), ())  # of a run that has learnt from it
    known = open_table(TableFile(tmp_path / "a.parquet", "parquet"), None, "any", TargetOptions(), schema=schema)
    assert everything(known.train)[0].tolist() == [[2, 1], [0, 2]]
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"a.parquet cannot be read as Parquet: .*; repair it$"):
        opened(spec)


def test_without_pyarrow_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(
        ConfigError, match=r"parquet: needs pyarrow, which is not installed; run: pip install 'lowmem-pnn\[parquet\]'$"
    ):
        opened(f"parquet:{tmp_path / 'a.parquet'}")
