"""Hugging Face's data sets: which columns are taken, and what is said where that is not clear."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.datasets import everything, image_bytes
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.workload.inputs import open_data

# The library's own, and dill's.
pytestmark = pytest.mark.filterwarnings("ignore")


def opened(place: Path | str, model: str = "resnet18", **options: Any) -> Any:
    return open_data(
        configure(max_gpu_mem="100MB", model=model, data=f"hfdata:{place}", device="cpu", **{"val_fraction": 0, **options})
    )


def test_images_and_class_labels_are_found(tmp_path: Path) -> None:
    hub = pytest.importorskip("datasets")
    images = image_bytes((6, 5, 3), num=6)
    features = hub.Features({"id": hub.Value("int64"), "img": hub.Image(), "fine": hub.ClassLabel(names=["cat", "dog", "owl"])})
    rows = {"id": list(range(6)), "img": [Image.fromarray(image) for image in images], "fine": [0, 1, 2, 1, 0, 0]}
    whole = hub.Dataset.from_dict(rows, features=features)
    hub.DatasetDict({"train": whole, "validation": whole.select([1]), "test": whole.select([3, 2])}).save_to_disk(tmp_path / "a")
    _, dataset, splits, _ = opened(tmp_path / "a", val_fraction=None)
    x, y = everything(splits["train"])
    assert torch.equal(x, torch.from_numpy(images).movedim(-1, 1) / 255)
    assert (y.tolist(), dataset.classes, dataset.num_classes) == ([0, 1, 2, 1, 0, 0], ("cat", "dog", "owl"), 3)
    assert [everything(splits[name])[1].tolist() for name in ("val", "test")] == [[1], [1, 2]]
    assert dataset.preprocessing == "decoded to RGB, uint8 / 255, HWC to CHW"
    assert everything(opened(tmp_path / "a", image_size=4, val_fraction=None)[2]["train"])[0].shape == (6, 3, 4, 4)


def test_numbers_and_a_named_target_are_taken(tmp_path: Path) -> None:
    hub = pytest.importorskip("datasets")
    hub.Dataset.from_dict({"x": np.eye(4).tolist(), "height": [0.5, 1.5, 2.0, 3.5]}).save_to_disk(tmp_path / "a")
    _, dataset, splits, _ = opened(tmp_path / "a", "mlp:4-1", target="height")
    assert torch.equal(everything(splits["train"])[0].sort(0).values[-1], torch.ones(4))
    assert dataset.targets.kind == "values"
    with pytest.raises(ConfigError, match=r"data hfdata:.* needs --target COLUMN; its columns are x, height$"):
        opened(tmp_path / "a", "mlp:4-1")
    with pytest.raises(ConfigError, match=r"data hfdata:.* has no column 'heigth'; did you mean 'height'\?$"):
        opened(tmp_path / "a", "mlp:4-1", target="heigth")
    hub.Dataset.from_dict({"a": [1.0], "b": [2.0], "label": [0]}).save_to_disk(tmp_path / "b")
    with pytest.raises(
        ConfigError, match=r"has the columns a, b, label, and which one samples are of is not clear; leave others out with"
    ):
        opened(tmp_path / "b", "mlp:1-1")


def test_what_cannot_be_opened_is_said_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"^data hfdata:.*/empty cannot be opened: FileNotFoundError: .*; give a folder that save_to_disk"
    ):
        opened(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"^data set 'hfdata:' says no place; write hfdata:DIR$"):
        opened("")


def test_without_the_library_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ConfigError, match=r"^hfdata: needs datasets, which is not installed; run: pip install 'lowmem-pnn\[hfdata\]'$"
    ):
        opened("mnist")
