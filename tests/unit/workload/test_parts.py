"""Parts of a run's data: from one source or several, matched by classes, augmented and normalised."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from helpers.datasets import everything, image_bytes, save
from helpers.transformers_folders import VIT, write_config
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.samples.augment import Augmenter
from lowmem_pnn.workload.inputs import open_data, python_inputs


def config(data: str, model: str = "resnet18", **options: Any) -> Any:
    return configure(max_gpu_mem="100MB", model=model, data=data, device="cpu", **options)


def parts(data: str, **options: Any) -> dict[str, Any]:
    return open_data(config(data, **options))[2]


def folder(root: Path, classes: str, num: int = 2, part: str = "", size: tuple[int, int] = (6, 6)) -> str:
    """An image folder whose images have the colour of their class's name."""
    for name in classes:
        (root / part / name).mkdir(parents=True)
        for number in range(num):
            Image.new("RGB", size, (ord(name), number, 0)).save(root / part / name / f"{number}.png")
    return f"imagefolder:{root}"


def classes_by_colour(split: Any) -> dict[str, int]:
    x, y = everything(split)
    return {chr(round(float(image[0, 0, 0]) * 255)): label for image, label in zip(x, y.tolist(), strict=True)}


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    train, other = folder(tmp_path / "train-set", "abcd"), folder(tmp_path / "other", "ca", num=3)
    splits = parts(train, val_data=other, test_data=other)
    assert {name: len(split) for name, split in splits.items()} == {"train": 8, "val": 6, "test": 6}
    assert classes_by_colour(splits["val"]) == classes_by_colour(splits["test"]) == {"a": 0, "c": 2}
    strange = folder(tmp_path / "x", "a")
    (tmp_path / "x" / "a").rename(tmp_path / "x" / "dd")
    with pytest.raises(
        DataError, match=r"--test-data .*/x has the class 'dd', .* has not; did you mean 'd'\?; give both the same names"
    ):
        parts(train, test_data=strange)


def test_classes_have_the_numbers_of_a_head_that_was_trained_on_them(tmp_path: Path) -> None:
    head = {"num_channels": 3, "num_labels": 2, "id2label": {0: "B", 1: "a"}}
    model = f"hf:{write_config(tmp_path / 'c.json', 'vit', 'ViTForImageClassification', VIT, **head)}"
    own, other = folder(tmp_path / "own", "ab", num=3), folder(tmp_path / "other", "ab")
    _, dataset, splits, _ = open_data(config(own, model, val_data=other))
    assert dataset.classes == ("b", "a")
    assert classes_by_colour(splits["train"]) == classes_by_colour(splits["val"]) == {"a": 1, "b": 0}


def test_the_part_of_that_name_is_taken(tmp_path: Path) -> None:
    other = tmp_path / "other"
    for part, num in (("train", 4), ("val", 1), ("test", 3)):
        folder(other, "ab", num, part)
    splits = parts(folder(tmp_path / "own", "ab"), val_data=f"imagefolder:{other}", test_data=f"imagefolder:{other}")
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "val": 2, "test": 6}
    (other / "val").rename(tmp_path / "away")
    with pytest.raises(
        DataError, match=r"--val-data imagefolder:.* has a training and a test part, and no validation part; give a source"
    ):
        parts(f"imagefolder:{tmp_path / 'own'}", val_data=f"imagefolder:{other}")


def test_classes_without_names_are_matched_by_number(tmp_path: Path) -> None:
    images = image_bytes((6, 6, 3), num=4)
    spec = save(tmp_path / "a.npz", x_train=images, y_train=np.array([0, 1, 1, 0]))
    assert everything(parts(folder(tmp_path / "own", "ab"), test_data=spec)["test"])[1].tolist() == [0, 1, 1, 0]
    spec = save(tmp_path / "b.npz", x_train=images, y_train=np.array([0, 1, 2, 0]))
    with pytest.raises(
        DataError, match=r"b.npz has classes up to number 2, and the training data up to 1; number the classes alike"
    ):
        parts(f"imagefolder:{tmp_path / 'own'}", test_data=spec)


def test_parts_of_another_form_are_refused(tmp_path: Path) -> None:
    own, other = folder(tmp_path / "own", "ab"), folder(tmp_path / "other", "ab", size=(8, 5))
    with pytest.raises(
        DataError,
        match=r"--val-data .* has samples of shape \(3, 5, 8\) float32 .* are \(3, 6, 6\) float32 .* of one form, or --image-size$",
    ):
        parts(own, val_data=other)
    assert everything(parts(own, val_data=other, image_size=4)["val"])[0].shape == (4, 3, 4, 4)


def test_other_sources_belong_to_the_data(tmp_path: Path) -> None:
    own, other = folder(tmp_path / "own", "ab"), folder(tmp_path / "other", "ab")
    prints = {open_data(config(own, **dict.fromkeys(names, other)))[1].fingerprint for names in ((), ("val_data",))}
    assert len(prints) == 2
    assert len({open_data(config(own, normalize=how))[1].fingerprint for how in ("none", "imagenet", "0.5/0.5")}) == 3


def test_options_for_parts_that_are_there_are_refused(tmp_path: Path) -> None:
    own, other = folder(tmp_path / "own", "ab", num=5), folder(tmp_path / "other", "ab")
    with pytest.raises(
        ConfigError, match=r"--test-fraction 0.2 has no effect here: there is a test part of 4 samples; leave the option"
    ):
        parts(own, test_data=other, test_fraction=0.2)
    with pytest.raises(
        ConfigError, match=r"--val-fraction 0.2 has no effect here: data imagefolder:.*/other has a validation part of 4"
    ):
        parts(own, val_data=other, val_fraction=0.2)
    assert len(parts(own, test_data=other, test_fraction=0)["test"]) == 4


def test_a_test_part_is_split_off_by_the_seed(tmp_path: Path) -> None:
    x = np.arange(40.0, dtype=np.float32).reshape(-1, 1)
    spec = save(tmp_path / "a.npz", x_train=x, y_train=np.arange(40) % 2)
    opened = [open_data(config(spec, "mlp:1-2", test_fraction=0.25, seed=seed)) for seed in (0, 0, 1)]
    numbers = [{name: everything(split)[0][:, 0].tolist() for name, split in splits.items()} for _, _, splits, _ in opened]
    assert numbers[0] == numbers[1]
    assert sorted(numbers[0]["test"]) != sorted(numbers[2]["test"])
    assert {name: len(own) for name, own in numbers[0].items()} == {"train": 27, "val": 3, "test": 10}
    assert sorted(itertools.chain(*numbers[0].values())) == x[:, 0].tolist()
    assert opened[0][1].parts == (
        "27 to train on, 3 to validate on (0.1 of the training data, by seed), 10 to test on (0.25 of the training data, by seed)"
    )
    limited = parts(spec, model="mlp:1-2", test_fraction=0.25, train_limit=10)
    assert everything(limited["test"])[0][:, 0].tolist() == numbers[0]["test"], "whatever is trained on"
    with pytest.raises(
        DataError, match=r"a test fraction of 0.99 of 40 samples leaves none to train on; use more samples, or a smaller"
    ):
        parts(spec, model="mlp:1-2", test_fraction=0.99)


def test_what_there_is_not_is_said(tmp_path: Path) -> None:
    spec = save(tmp_path / "a.npz", x_train=np.zeros((4, 1)), y_train=np.arange(4))
    assert open_data(config(spec, "mlp:1-4", val_fraction=0))[1].parts == "4 to train on, none to validate or test on"


def test_training_images_are_augmented_and_all_are_normalised(tmp_path: Path) -> None:
    images, y = image_bytes((3, 8, 8), num=20), np.arange(20) % 2
    spec = save(tmp_path / "a.npz", x_train=images, y_train=y, x_test=images[:3], y_test=y[:3])
    source, dataset, splits, _ = open_data(config(spec, augment="trivial", normalize="imagenet", seed=5))
    normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    plain = open_data(config(spec, seed=5))[2]
    for name in ("train", "val", "test"):
        assert torch.equal(everything(splits[name])[0], normalize(everything(plain[name])[0]))
    numbers = np.array([4, 0, 9])
    x = Augmenter("trivial", 18, 5)(plain["train"].batch(numbers)[0], numbers, ("epoch", 2))
    assert torch.equal(splits["train"].batch(numbers, ("epoch", 2))[0], normalize(x))
    assert torch.equal(splits["val"].batch([0, 1], ("epoch", 2))[0], splits["val"].batch([0, 1])[0])
    assert dataset.preprocessing.endswith(
        "uint8 / 255, normalised by mean 0.485, 0.456, 0.406 and deviation 0.229, 0.224, 0.225, those of ImageNet"
    )
    assert source.image_stats is None


def test_integers_become_numbers_where_they_are_images(tmp_path: Path) -> None:
    spec = save(tmp_path / "a.npz", x_train=image_bytes((3, 8, 8)).astype(np.int64), y_train=np.arange(6))
    _, dataset, splits, _ = python_inputs(torch.nn.Flatten(), spec, None, None)(config(spec, "python:model", normalize="0/255"))
    x, _ = everything(splits["train"])
    assert (dataset.dtype, x.dtype, float(x.max()) <= 1) == (torch.float32, torch.float32, True)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            (5,),
            {"augment": "basic"},
            r"--augment basic is for images \(C, H, W\), and the samples of data a are \(5,\); leave it out",
        ),
        (
            (4, 8, 8),
            {"augment": "trivial"},
            r"--augment trivial is for images of 1 or 3 channels, and those of data a have 4; give --augment",
        ),
        (
            (5,),
            {"normalize": "imagenet"},
            r"imagenet has 3 means, and the samples of data a have shape \(5,\), without channels; give one",
        ),
    ],
)
def test_what_is_no_image_is_refused(shape: tuple[int, ...], options: Any, message: str, tmp_path: Path) -> None:
    spec = save(tmp_path / "a.npz", x_train=np.zeros((6, *shape), dtype=np.float32), y_train=np.arange(6))
    with pytest.raises(ConfigError, match=message):
        python_inputs(torch.nn.Flatten(), spec, None, None)(config(spec, "python:model", **options))


def test_tokens_are_not_normalised(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be or not to be, that is the question" * 9)
    text = f"text:{tmp_path / 'a.txt'}"
    model = "gpt:layers=1,width=8,heads=1,context=8"
    with pytest.raises(
        ConfigError, match=r"--normalize auto is for images \(C, H, W\), and the samples of data a are \(8,\); leave it out"
    ):
        parts(text, model=model, normalize="auto", method="exact")
    with pytest.raises(ConfigError, match=r"--image-size has no effect here: data 'text:.*' is text; leave it out"):
        parts(text, model=model, image_size=8, method="exact")


def test_parts_of_python_have_the_shape_of_the_training_data() -> None:
    train, val = (torch.zeros(8, 3), torch.arange(8) % 2), (torch.zeros(8, 4), torch.arange(8) % 2)
    with pytest.raises(
        DataError,
        match=r"'python:tuple': training samples are \(3,\) torch.float32, validation samples \(4,\) torch.float32; give both one",
    ):
        python_inputs("mlp:3-2", train, val, None)(config("python:tuple", "mlp:3-2"))


@pytest.mark.parametrize("place", [0, 1])
def test_masks_of_all_parts_are_kept_in_the_widest_type(place: int) -> None:
    x, masks = torch.rand(8, 3, 4, 4), torch.arange(8 * 16).view(8, 4, 4) % 3
    both = [masks, masks.clone()]
    both[place][0, 0] = -100
    asked = config("python:tuple", "python:Conv2d", method="exact", ignore_index=-100)
    _, dataset, splits, _ = python_inputs(lambda: torch.nn.Conv2d(3, 3, 1), (x, both[0]), (x, both[1]), None)(asked)
    assert dataset.targets.dtype == torch.int64
    assert all(torch.equal(everything(part)[1], kept) for part, kept in zip((dataset.train, splits["val"]), both, strict=True))
