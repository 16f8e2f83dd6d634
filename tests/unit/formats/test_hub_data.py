"""Hugging Face's data sets: which columns are taken, and what is said where that is not clear."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PIL

from helpers.datasets import everything, image_bytes
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.formats.hub_data import open_hub_samples
from lowmem_pnn.sources.targets import TargetOptions
from lowmem_pnn.workload.inputs import open_data


class Image:
    """What the library's features are, as far as they are looked at: the name of the class, and the names of classes."""


class Value:
    pass


class ClassLabel:
    def __init__(self, names: list[str]) -> None:
        self.names = names


class Rows:
    def __init__(self, features: dict[str, Any], rows: dict[str, Any]) -> None:
        self.features, self._rows = features, rows

    def __len__(self) -> int:
        return len(next(iter(self._rows.values())))

    def __getitem__(self, index: int | str) -> Any:
        return self._rows[index] if isinstance(index, str) else {name: values[index] for name, values in self._rows.items()}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Data sets by their folder or name on the hub; the library itself is a stand-in."""
    there: dict[str, Any] = {}

    def load(place: str, *configuration: Any) -> Any:
        key = ":".join([place, *(word for word in configuration if word)])
        if key not in there:
            raise FileNotFoundError(f"Couldn't find {key}")
        return there[key]

    module = types.ModuleType("datasets")
    module.load_from_disk = module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.chdir(tmp_path)
    return there


def opened(place: Path | str, model: str = "resnet18", **options: Any) -> Any:
    return open_data(
        configure(max_gpu_mem="100MB", model=model, data=f"hfdata:{place}", device="cpu", **{"val_fraction": 0, **options})
    )


IMAGES = image_bytes((6, 5, 3), num=6)


def pictures(chosen: list[int]) -> Rows:
    rows = {
        "id": chosen,
        "img": [PIL.fromarray(IMAGES[number]) for number in chosen],
        "fine": [(0, 1, 2, 1, 0, 0)[number] for number in chosen],
    }
    return Rows({"id": Value(), "img": Image(), "fine": ClassLabel(["cat", "dog", "owl"])}, rows)


def test_images_and_class_labels_are_found(library: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    parts = {"train": pictures(list(range(6))), "validation": pictures([1]), "test": pictures([3, 2])}
    library[str(tmp_path / "a")] = library["pets:small"] = parts
    for place in (tmp_path / "a", "a", "pets:small"):
        _, dataset, splits, _ = opened(place, val_fraction=None)
        x, y = everything(dataset.train)
        assert torch.equal(x, torch.from_numpy(IMAGES).movedim(-1, 1) / 255)
        assert (y.tolist(), dataset.classes, dataset.num_classes) == ([0, 1, 2, 1, 0, 0], ("cat", "dog", "owl"), 3)
        assert [everything(splits[name])[1].tolist() for name in ("val", "test")] == [[1], [1, 2]]
        assert dataset.preprocessing == "decoded to RGB, uint8 / 255, HWC to CHW"
    assert everything(opened("pets:small", image_size=4, val_fraction=None)[1].train)[0].shape == (6, 3, 4, 4)


def test_images_of_more_than_8_bits_keep_them(library: dict[str, Any]) -> None:
    deep = np.arange(30, dtype=np.uint16).reshape(5, 6) * 2000 + 300
    features = {"img": Image(), "fine": ClassLabel(["cat", "dog"])}
    library["scans"] = Rows(features, {"img": [PIL.fromarray(deep), PIL.fromarray(deep[::-1].copy())], "fine": [0, 1]})
    _, dataset, _, _ = opened("scans")
    x, _ = everything(dataset.train)
    assert torch.equal(x[0], torch.from_numpy(deep.astype(np.float64) / 65535).float().expand(3, 5, 6))
    assert dataset.preprocessing == "decoded to RGB, HWC to CHW, grey values of more than 8 bits brought to 0 to 1"
    assert everything(opened("scans", image_size=4)[1].train)[0].shape == (2, 3, 4, 4)
    [(split, _)] = open_hub_samples("scans", None, "any", TargetOptions()).values()
    assert torch.equal(everything(split)[0], x)
    mixed = {"img": [PIL.fromarray(IMAGES[0]), PIL.fromarray(np.arange(30, dtype=np.uint16).reshape(6, 5))], "fine": [0, 1]}
    library["mixed"] = Rows(features, mixed)
    with pytest.raises(DataError, match=r"sample 1 of hfdata:mixed \(training part\) is \(3, 6, 5\) torch.float32, sample 0 is"):
        everything(opened("mixed")[1].train)
    library["floats"] = Rows(features, {"img": [PIL.fromarray(deep.astype(np.float32))], "fine": [0]})
    with pytest.raises(
        DataError, match=r"^image 0 of column 'img' is of mode F \(floating-point numbers\), and which value is white"
    ):
        opened("floats")


def test_numbers_and_a_named_target_are_taken(library: dict[str, Any]) -> None:
    library["a"] = Rows({"x": Value(), "height": Value()}, {"x": np.eye(4).tolist(), "height": [0.5, 1.5, 2.0, 3.5]})
    _, dataset, _, _ = opened("a", "mlp:4-1", target="height")
    assert torch.equal(everything(dataset.train)[0], torch.eye(4))
    assert dataset.targets.kind == "values"
    library["b"] = Rows({name: Value() for name in ("a", "b", "label")}, {"a": [1.0], "b": [2.0], "label": [0]})
    library["c"] = {"dev": library["a"]}
    library["twice"] = {"train": library["a"], "valid": library["a"], "validation": library["a"]}
    for place, options, message in (
        ("a", {}, r"^data hfdata:a needs --target COLUMN; its columns are x, height$"),
        ("a", {"target": "heigth"}, r"^data hfdata:a has no column 'heigth'; did you mean 'height'\?$"),
        ("a", {"target": "x,height"}, r"^data hfdata:a: --target x,height names several columns; give one$"),
        (
            "b",
            {},
            r"^data hfdata:b has the columns a, b, label, and which one samples are of is not clear; leave others out with",
        ),
        (
            "twice",
            {},
            r"^data hfdata:twice has the parts 'train', 'valid', 'validation', two of which are one to us \(val\); leave",
        ),
        ("c", {}, r"^data hfdata:c has the parts 'dev', and no training part; save one called train$"),
        (
            "d",
            {},
            r"^data hfdata:d cannot be opened: FileNotFoundError: Couldn't find d; give a folder that save_to_disk wrote, or a name",
        ),
        ("", {}, r"^data set 'hfdata:' says no place; write hfdata:DIR$"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(place, "mlp:4-1", **options)


def test_without_the_library_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigError, match=r"^hfdata: needs datasets, which is not installed; run: pip install 'lowmem-pnn\[hfdata\]'$"
    ):
        opened("mnist")


# To be predicted.


def samples(place: str, target: tuple[str, ...] | None = None) -> dict[str, tuple[list[Any], list[Any], bool]]:
    parts = open_hub_samples(place, target, "any", TargetOptions())
    return {name: (*(values.tolist() for values in everything(split)), labelled) for name, (split, labelled) in parts.items()}


def test_rows_without_targets_are_taken_and_parts_of_any_name(library: dict[str, Any]) -> None:
    x = [[0.0, 1.0], [2.0, 3.0]]
    library["alone"] = Rows({"x": Value()}, {"x": x})
    library["both"] = Rows({"x": Value(), "y": ClassLabel(["a", "b"])}, {"x": x, "y": [1, 0]})
    library["parts"] = {"test": library["alone"]}
    library["odd"] = {"unseen": library["both"]}
    assert samples("alone") == {"all": (x, [0, 0], False)}
    assert samples("both") == {"all": (x, [1, 0], True)}
    assert samples("both", ("y",)) == {"all": (x, [1, 0], True)}
    assert samples("alone", ("y",)) == {"all": (x, [0, 0], False)}
    assert samples("parts") == {"test": (x, [0, 0], False)}
    assert samples("odd") == {"unseen": (x, [1, 0], True)}
    library["hidden"] = {"test": Rows({"x": Value(), "y": ClassLabel(["a", "b"])}, {"x": x, "y": [-1, -1]})}
    assert samples("hidden") == {"test": (x, [0, 0], False)}
    assert open_hub_samples("hidden", None, "any", TargetOptions())["test"][0].notes == (
        "targets of hfdata:hidden (test part) are left aside: column 'y' holds labels that are missing or below 0",
    )
    with pytest.raises(DataError, match=r"^sample 0 of hfdata:hidden \(test part\) has label -1, outside 0 to 1"):
        open_hub_samples("hidden", None, "any", TargetOptions(), may_lack_labels=False)["test"][0].batch([0])


def test_which_column_is_meant_has_to_be_clear(library: dict[str, Any]) -> None:
    library["two"] = Rows({"a": Value(), "b": Value()}, {"a": [0.0], "b": [1.0]})
    with pytest.raises(ConfigError) as caught:
        samples("two")
    assert str(caught.value) == (
        "data hfdata:two has the columns a, b, and which one samples are of is not clear; leave others out with remove_columns()"
    )


def test_classes_of_another_order_are_renumbered_or_refused(library: dict[str, Any]) -> None:
    x = np.eye(3).tolist()
    library["a"] = Rows({"x": Value(), "y": ClassLabel(["cat", "dog"])}, {"x": x, "y": [0, 1, 1]})
    library["b"] = Rows({"x": Value(), "y": ClassLabel(["dog", "cat"])}, {"x": x, "y": [0, 1, 1]})
    splits = opened("a", "mlp:3-2", test_data="hfdata:b")[2]
    assert everything(splits["test"])[1].tolist() == [1, 0, 0]
    (split, _), *_ = open_hub_samples("b", None, "any", TargetOptions()).values()
    assert split.classes == ("dog", "cat")
    library["both"] = {"train": library["a"], "test": library["b"]}
    library["less"] = {"train": library["a"], "test": Rows({"x": Value()}, {"x": x})}
    for place, message in (
        (
            "both",
            r"^hfdata:both: column 'y' has other classes in the test part, or in another order, than in the training part; cast",
        ),
        ("less", r"^hfdata:less: the test part has no column 'y'; leave the part out, or give it one$"),
    ):
        with pytest.raises(ConfigError, match=message):
            opened(place, "mlp:3-2")
