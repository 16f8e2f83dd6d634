"""Prediction: what a finished run answers is what its own model answers, for every task, of any data, in every form of file."""

import csv
import dataclasses
import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lowmem_pnn as package
from helpers.commands import lowmem_pnn, train, write_data
from helpers.datasets import Pairs
from lowmem_pnn.errors import BudgetError, ConfigError, DataError
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.result import Result

SMALL: dict[str, Any] = {"max_gpu_mem": "100MB", "device": "cpu", "epochs": 1, "method": "exact", "compare": False}


def fit(model: Any, data: Any, folder: Path, **options: Any) -> Result:
    return package.fit(model, data, workdir=folder / "run", **{**SMALL, **options})


def answers(result: Result, model: nn.Module, *x: Tensor) -> Any:
    """What the trained model answers in plain PyTorch."""
    with torch.no_grad():
        return result.load(model).eval()(*x)


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    first, *rows = csv.reader(path.read_text().splitlines())
    return first, rows


def photo(path: Path, number: int, size: tuple[int, int] = (12, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(number).randint(0, 256, (*size, 3)).astype(np.uint8)).save(path)
    return path


def small_net(outputs: int = 2) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs))


# Classification of vectors, in two partitions.


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.npz and a run of two partitions."""
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder / "data.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = train("--method exact --partitions 2")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def test_scores_are_those_of_the_model_and_test_targets_are_there(here: Path) -> None:
    arrays, model = package.predict("run"), package.load("run")
    with np.load("data.npz") as data, torch.no_grad():
        assert np.array_equal(arrays["scores"], model(torch.from_numpy(data["x_test"])).numpy())
        assert np.array_equal(arrays["targets"], data["y_test"])
    assert set(arrays) == {"scores", "targets"}
    assert float((arrays["scores"].argmax(1) == arrays["targets"]).mean()) == package.evaluate("run")["test_accuracy"]


def test_every_part_has_the_samples_that_the_run_had(here: Path) -> None:
    parts = {part: package.predict("run", part=part) for part in ("train", "val", "test", "all")}  # type: ignore[arg-type]
    assert {name: len(arrays["scores"]) for name, arrays in parts.items()} == {"train": 108, "val": 12, "test": 30, "all": 150}
    whole = np.concatenate([parts[name]["scores"] for name in ("train", "val", "test")])
    assert np.array_equal(parts["all"]["scores"], whole)


def test_a_result_stands_for_its_run(here: Path) -> None:
    result = Result.from_json(Path("run/result.json").read_text())
    assert package.evaluate(result)["test_accuracy"] == result.test_accuracy
    assert torch.equal(package.load(result)[0].weight, package.load("run")[0].weight)  # type: ignore[index,arg-type]


@pytest.mark.parametrize("method", ["pnn --kappa 1", "neuroflux --heads linear"])
def test_other_methods_predict_too(here: Path, tmp_path: Path, method: str) -> None:
    assert train(f"--method {method} --partitions 2", workdir=str(tmp_path / "run")).code == 0
    arrays = package.predict(tmp_path / "run")
    with np.load("data.npz") as data, torch.no_grad():
        expected = package.load(tmp_path / "run")(torch.from_numpy(data["x_test"]))
    assert np.array_equal(arrays["scores"], expected.numpy())


def test_samples_alone_are_predicted_in_all_forms_that_python_has(here: Path) -> None:
    with np.load("data.npz") as data:
        x, y = data["x_test"], data["y_test"]
    expected = package.predict("run")["scores"]
    forms: dict[str, Any] = {
        "list": x.tolist(),
        "dictionaries": Pairs([{"x": row} for row in x]),
        "loader": DataLoader(Pairs(list(torch.from_numpy(x))), batch_size=7),
    }
    for name, form in forms.items():
        found = package.predict("run", form)
        assert np.array_equal(found["scores"], expected), name
        assert set(found) == {"scores"}, name
    for name, form in {"pair": (x, y)}.items():
        found = package.predict("run", form)
        assert np.array_equal(found["scores"], expected), name
        assert np.array_equal(found["targets"], y), name


def test_a_file_of_samples_alone_is_predicted(here: Path, tmp_path: Path) -> None:
    with np.load("data.npz") as data:
        x = data["x_test"]
    np.savez(tmp_path / "x.npz", x=np.concatenate([x[:1] * np.nan, x]))
    done = lowmem_pnn(f"predict run --data {tmp_path / 'x.npz'} --out {tmp_path / 'o.npz'} --skip-broken --json")
    assert done.code == 0, done.err
    with np.load(tmp_path / "o.npz") as found:
        assert (found.files, found["samples"].tolist()) == (["samples", "scores"], list(range(1, 31)))
        assert np.array_equal(found["scores"], package.predict("run")["scores"])


def test_a_table_has_a_row_for_each_sample(here: Path, tmp_path: Path) -> None:
    done = lowmem_pnn(f"predict run --out {tmp_path / 'o.csv'}")
    assert (done.code, done.out) == (0, f"predicted 30 samples, the test part of npz:{here / 'data.npz'}: {tmp_path / 'o.csv'}\n")
    first, rows = read_table(tmp_path / "o.csv")
    arrays = package.predict("run")
    best = torch.from_numpy(arrays["scores"]).softmax(-1).max(-1)
    assert first == ["sample", "class", "probability", "target"]
    assert [row[0] for row in rows] == [str(number) for number in range(30)]
    assert [int(row[1]) for row in rows] == best.indices.tolist()
    assert [np.float32(row[2]) for row in rows] == best.values.tolist()
    assert [int(row[3]) for row in rows] == arrays["targets"].tolist()


def test_a_smaller_budget_takes_more_partitions_and_answers_the_same(tmp_path: Path) -> None:
    x, y = torch.rand(40, 64), torch.arange(40) % 3
    result = fit("mlp:64-512-512-512-3", (x, y), tmp_path, method="backprop")
    expected = package.predict(result, x)["scores"]
    entered: list[str] = []

    class Titles(Display):
        def enter(self, title: str) -> None:
            entered.append(title)

    found = package.predict(result, x, max_gpu_mem="3.6MB", display=Titles())["scores"]
    assert [title.partition(" (")[0] for title in entered] == ["partition 1 of 2", "partition 2 of 2"]
    assert np.array_equal(found, expected)
    with pytest.raises(
        BudgetError, match=r"^layer '1' alone has 1\.1 MB of weights, above the budget of 1\.0 MB; give a larger --max"
    ):
        package.predict(result, x, max_gpu_mem="1MB")


# Files.


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos of two classes, and a run on them."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(8):
        photo(folder / "data" / ("cats", "dogs")[number % 2] / f"{number}.png", number, (12, 12 + number))
    (folder / "net.py").write_text(
        "from torch import nn\n"
        "def net(num_classes=2):\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = train(
            "--image-size 10 --normalize auto --test-fraction 0.25 --method exact", "net.py:net", f"imagefolder:{folder / 'data'}"
        )
    assert done.code == 0, done.err
    return folder


def test_photos_without_classes_are_predicted_by_name(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    photo(tmp_path / "new" / "b.jpg", 1, (20, 30))
    photo(tmp_path / "new" / "deep" / "a.png", 0)
    arrays = package.predict("run", tmp_path / "new", trust=True)
    assert arrays["files"].tolist() == ["b.jpg", "deep/a.png"]
    assert arrays["classes"].tolist() == ["cats", "dogs"]
    assert set(arrays) == {"scores", "classes", "files"}
    done = lowmem_pnn(f"predict run --data {tmp_path / 'new'} --out {tmp_path / 'o.csv'} --trust")
    assert done.code == 0, done.err
    first, rows = read_table(tmp_path / "o.csv")
    assert first == ["file", "class", "probability"]
    assert [row[:2] for row in rows] == [
        [name, ("cats", "dogs")[best]] for name, best in zip(arrays["files"], arrays["scores"].argmax(1), strict=True)
    ]
    one = package.predict("run", tmp_path / "new" / "b.jpg", trust=True)
    assert (one["files"].tolist(), np.array_equal(one["scores"], arrays["scores"][:1])) == (["b.jpg"], True)


def test_photos_in_folders_of_the_classes_have_targets_and_are_shown_as_in_training(photos: Path, tmp_path: Path) -> None:
    whole = package.predict(photos / "run", f"imagefolder:{photos / 'data'}", trust=True, part="all")
    names = [f"{('cats', 'dogs')[number % 2]}/{number}.png" for number in range(8)]
    by_name = dict(zip(whole["files"].tolist(), range(8), strict=True))
    assert sorted(by_name) == sorted(names)
    assert [int(whole["targets"][by_name[name]]) for name in names] == [0, 1] * 4
    elsewhere = tmp_path / "copy"
    for name in names[:3]:
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).write_bytes((photos / "data" / name).read_bytes())
    some = package.predict(photos / "run", elsewhere, trust=True)
    assert some["files"].tolist() == ["cats/0.png", "cats/2.png", "dogs/1.png"]
    assert some["targets"].tolist() == [0, 0, 1]
    assert np.array_equal(some["scores"], whole["scores"][[by_name[name] for name in some["files"].tolist()]])


def test_a_table_without_the_target_is_standardised_as_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [(number, ("red", "blue")[number % 2], number * 0.5 + 0.25) for number in range(40)]
    Path("a.csv").write_text("size,colour,price\n" + "".join(f"{a},{b},{c}\n" for a, b, c in rows))
    Path("b.csv").write_text("colour,size\nblue,3\nred,100\n")
    done = train("--target price --method exact --optimizer sgd", "mlp:3-4-1", "csv:a.csv")
    assert done.code == 0, done.err
    result = Result.from_json(Path("run/result.json").read_text())
    mean, std = (torch.tensor(result.preparation[name]) for name in ("mean", "std"))
    x = (torch.tensor([[3.0, 1, 0], [100, 0, 1]]) - mean) / std
    expected = answers(result, package.load("run"), x)
    assert torch.equal(torch.from_numpy(package.predict("run", "b.csv")["outputs"]), expected)
    Path("c.csv").write_text("price,colour,size\n,blue,3\n1.5,green,7\n?,red,100\n")
    done = lowmem_pnn("predict run --data c.csv --out o.csv --skip-broken")
    assert done.code == 0, done.err
    assert "left out 1 broken sample: line 3 of " in done.err
    assert "c.csv are left aside: line 2 has no value in column 'price'" in done.err
    first, found = read_table(Path("o.csv"))
    assert (first, [row[0] for row in found]) == (["sample", "price"], ["0", "2"])
    assert [np.float32(row[1]) for row in found] == expected[:, 0].tolist()
    assert lowmem_pnn("predict run --out all.csv").code == 0
    first, found = read_table(Path("all.csv"))
    assert (first, len(found)) == (["sample", "price", "target price"], 4)


# Tasks.


def test_labels_are_probabilities_in_a_table_and_logits_in_arrays(tmp_path: Path) -> None:
    x, y = torch.rand(20, 6), (torch.rand(20, 3) > 0.5).float()
    result = fit(lambda: nn.Linear(6, 3), (x, y), tmp_path)
    expected = answers(result, nn.Linear(6, 3), x)
    assert torch.equal(torch.from_numpy(package.predict(result, x)["scores"]), expected)
    package.predict(result, x, tmp_path / "o.csv")
    first, rows = read_table(tmp_path / "o.csv")
    assert first == ["sample", "label_0", "label_1", "label_2"]
    assert torch.tensor([[float(value) for value in row[1:]] for row in rows]).equal(expected.sigmoid())


def test_masks_are_files_called_as_the_images_are(tmp_path: Path) -> None:
    for number in range(5):
        photo(tmp_path / "data" / "images" / f"{number}.png", number)
        (tmp_path / "data" / "masks").mkdir(exist_ok=True)
        Image.fromarray((np.arange(144).reshape(12, 12) % 3).astype(np.uint8)).save(tmp_path / "data" / "masks" / f"{number}.png")
    result = fit(lambda: nn.Conv2d(3, 3, 1), f"segmentation:{tmp_path / 'data'}", tmp_path)
    arrays = package.predict(result, f"segmentation:{tmp_path / 'data'}", part="all")
    assert (arrays["scores"].shape, arrays["targets"].shape) == ((5, 3, 12, 12), (5, 12, 12))
    photo(tmp_path / "new" / "sub" / "x.png", 0)
    photo(tmp_path / "new" / "y.jpg", 3)
    package.predict(result, tmp_path / "new", f"{tmp_path / 'masks'}/")
    assert sorted(str(path.relative_to(tmp_path / "masks")) for path in (tmp_path / "masks").rglob("*.png")) == [
        "sub/x.png",
        "y.png",
    ]
    whole = dict(zip(arrays["files"].tolist(), arrays["scores"], strict=True))
    found = np.asarray(Image.open(tmp_path / "masks" / "sub" / "x.png"))
    assert np.array_equal(found, whole["images/0.png"].argmax(0))
    package.predict(result, f"segmentation:{tmp_path / 'data'}", tmp_path / "masks", part="all", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "masks").rglob("*")) == [f"{number}.png" for number in range(5)]


def test_tokens_are_predicted_window_by_window(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a tale of two cities, " * 30)
    result = fit(
        "gpt:layers=1,width=16,heads=2,context=16", f"text:{tmp_path / 'book.txt'}", tmp_path, loss_chunk=8, batch_size=4
    )
    arrays = package.predict(result, tmp_path / "book.txt", part="test")
    assert arrays["scores"].shape == (len(arrays["targets"]), 16, 256)
    # What comes before the second window is the last target of the first one.
    book = torch.tensor(arrays["targets"][:2].reshape(-1).astype(np.int64))
    with torch.no_grad():
        expected = package.load(result)(book[15:31][None])
    assert torch.allclose(torch.from_numpy(arrays["scores"][1]), expected[0], atol=1e-6)


class Two(nn.Module):
    """Takes two tensors, and returns a dictionary of two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        h = torch.relu(self.a(left) + self.b(right))
        return {"sum": h.sum(1), "h": h}


def test_a_loss_of_ones_own_gives_all_outputs_by_their_names(tmp_path: Path) -> None:
    x = {"left": torch.rand(12, 3), "right": torch.rand(12, 2)}
    result = fit(Two, (x, torch.rand(12)), tmp_path, loss=lambda outputs, y: ((outputs["sum"] - y) ** 2).mean())
    expected = answers(result, Two(), x["left"], x["right"])
    for data in ((x, torch.zeros(12)), Pairs([{"left": a, "right": b} for a, b in zip(*x.values(), strict=True)])):
        arrays = package.predict(result, data)
        assert {name for name in arrays if name != "targets"} == {"sum", "h"}
        assert torch.equal(torch.from_numpy(arrays["sum"]), expected["sum"])
        assert torch.equal(torch.from_numpy(arrays["h"]), expected["h"])
    with pytest.raises(ConfigError, match=r"the model gives more than a row of numbers for each sample: give --out FILE\.npz$"):
        package.predict(result, x, tmp_path / "o.csv")


def test_integers_are_numbers_where_they_were_in_training(tmp_path: Path) -> None:
    x = torch.randint(0, 9, (20, 6))
    result = fit(lambda: nn.Linear(6, 2), (x, x.sum(1) % 2), tmp_path)
    expected = answers(result, nn.Linear(6, 2), x.float())
    assert torch.equal(torch.from_numpy(package.predict(result, x.numpy())["scores"]), expected)


# What is refused, in one line.


def _files(folder: Path) -> None:
    """Data of other kinds and forms than that of the run."""
    np.savez(folder / "wide.npz", x=np.zeros((4, 21), np.float32))
    np.savez(folder / "values.npz", x=np.zeros((4, 20), np.float32), y=np.full(4, 0.5))
    (folder / "table.csv").write_text("a,b\n1,2\n")
    (folder / "fails.py").write_text("def data():\n    raise ValueError('no data')\n")
    (folder / "made.py").write_text(
        "import torch\nfrom lowmem_pnn.sources.datasets import make_dataset\n"
        "def data():\n    return make_dataset((torch.zeros(4, 20), torch.arange(4) % 3), name='made')\n"
    )


REFUSED = {
    "--data digits --part tets": "--part 'tets' is none of train, val, test, all; did you mean 'test'?",
    "--data wide.npz --part val": "--part val: data npz:HERE/wide.npz has no parts; leave --part out",
    "--data digits --part val": "--part val: data digits has a training and a test part, and no validation part; give --part all",
    "--data wide.npz": "data npz:HERE/wide.npz has samples of shape (21,) float32, and the run was trained on samples of shape (20,) "
    "float32; give data of one form",
    "--data values.npz": "HERE/values.npz: y: a label is 0.5; labels are class numbers, whole and from 0",
    "--data table.csv": "data csv:HERE/table.csv is a table, and the run was trained on npz:RUN/data.npz, which is none; give data of one "
    "kind",
    "--data npz:": "data 'npz:' says no place; write npz:FILE",
    "--data digits --skip-broken": "--skip-broken has no effect here: data digits has no broken samples; leave it out",
    "--data jsonl:chat.jsonl --skip-broken": "--skip-broken has no effect here: data jsonl:HERE/chat.jsonl is text; leave it out",
    "--data made.py:data --skip-broken --trust": "--skip-broken has no effect here: 'HERE/made.py:data' returns a Dataset that is made already; "
    "leave it out",
    "--data fails.py:data": "data 'HERE/fails.py:data' cannot be opened: ValueError: no data; see to the function",
    "--data nothing": "there is no data set 'nothing'; there are: digits, mnist, fashion-mnist, emnist-balanced, cifar10, cifar100; "
    "others are given as npz:FILE, imagefolder:DIR, segmentation:DIR, csv:FILE, "
    "parquet:FILE, hfdata:DIR, text:FILE, jsonl:FILE, tokens:FILE, package.module:factory or file.py:factory",
    "--data gone.npz": "data set 'gone.npz' looks like a file, which is not there; write npz:gone.npz",
    "--data npz:gone.npz": "there is no file HERE/gone.npz; give npz:FILE with arrays x_train, y_train, x_test, y_test",
    "--max-gpu-mem lots": "--max-gpu-mem: 'lots' is not a size; write 512MB or 512MiB",
}


@pytest.mark.parametrize("options", REFUSED)
def test_data_that_cannot_be_predicted_is_one_line(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str
) -> None:
    _files(tmp_path)
    monkeypatch.chdir(tmp_path)
    done = lowmem_pnn(f"predict {here / 'run'} {options} --out o.npz --quiet")
    assert (done.code, done.fault.replace(str(tmp_path), "HERE").replace(str(here), "RUN")) == (3, REFUSED[options]), done.err
    assert not list(tmp_path.glob("*o.npz*"))


def test_an_answer_that_a_file_cannot_hold_is_one_line(here: Path, tmp_path: Path) -> None:
    done = lowmem_pnn(f"predict run --out {tmp_path / 'masks'}/")
    assert (
        done.fault == "--out DIR/ takes masks, and the model gives no class for each pixel; give --out FILE.csv or --out FILE.npz"
    )
    assert "--out" in lowmem_pnn("predict run").fault
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_does_not_say_what_its_samples_are_is_one_line(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lowmem_pnn.inference import opened_run as module

    opened = module.open_finished

    def of_an_earlier_version(rundir: Any) -> Any:
        finished = opened(rundir)
        return dataclasses.replace(finished, result=dataclasses.replace(finished.result, form={}))

    monkeypatch.setattr(module, "open_finished", of_an_earlier_version)
    with pytest.raises(ConfigError) as caught:
        package.predict("run")
    assert str(caught.value) == (
        "the run in run does not say what its samples are like: it is of an earlier version, or samples are of a class of your own; load its "
        "weights into your model by lowmem_pnn.load_weights"
    )


def test_what_python_has_given_is_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(20, 4)
    result = fit(lambda: nn.Linear(4, 2), (x, torch.arange(20) % 2), tmp_path)
    with pytest.raises(ConfigError) as caught:
        package.predict(result)
    assert str(caught.value) == (
        "the run was trained on data from Python (python:tuple), which no name leads to; give the data to predict"
    )
    monkeypatch.setattr("lowmem_pnn.inference.load._GIVEN", {})
    done = lowmem_pnn(f"predict {result.workdir} --data digits --out {tmp_path / 'o.npz'}")
    assert done.fault == (
        "this run was started from Python with its own model (python:<lambda>), which no name leads to; give it again, from Python: "
        f"lowmem_pnn.predict('{result.workdir}', data, model=...)"
    )
    assert package.predict(result, x, model=lambda: nn.Linear(4, 2))["scores"].shape == (20, 2)
    with pytest.raises(DataError, match=r"^data python:Tensor has samples of shape \(3,\) float32, and the run was trained on"):
        package.predict(result, x[:, :3], model=lambda: nn.Linear(4, 2))


def test_a_full_disk_changes_nothing(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "o.csv").write_text("before")

    def full(self: Any, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lowmem_pnn.inference.answers.TableWriter.add", full)
    done = lowmem_pnn(f"predict run --out {tmp_path / 'o.csv'} --overwrite")
    assert (done.code, done.fault) == (
        5,
        f"cannot write to {tmp_path / 'o.csv'}: no space left on device; make room there, or give another --out",
    )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("o.csv", "before")]
