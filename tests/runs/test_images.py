"""Whole runs on images as people have them: of all sizes, augmented, normalised; held against a plain loop with torchvision."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2

import lowmem_pnn
from helpers.commands import lowmem_pnn as command
from helpers.datasets import Pairs, image_bytes
from helpers.displays import Messages
from helpers.plainloops import assert_same_weights, built, loaded
from lowmem_pnn.config.configure import configure
from lowmem_pnn.samples.augment import RandomCropFlip, policy_seed
from lowmem_pnn.seeds import permutation_of
from lowmem_pnn.workload.inputs import open_data

SIDE, SEED, EPOCHS, BATCH, RATE = 8, 3, 2, 5, 0.05


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * SIDE * SIDE, 3))


def write(folder: Path, num: int = 12) -> list[tuple[torch.Tensor, int]]:
    """Write images of many sizes in three classes, and return them with their classes, in the order of the data set."""
    images = []
    for number in range(num):
        label = number * 3 // num
        (folder / "abc"[label]).mkdir(parents=True, exist_ok=True)
        image = image_bytes((10 + number, 20 - number, 3), num=1)[0]
        Image.fromarray(image).save(folder / "abc"[label] / f"{number:02}.png")
        images.append((torch.from_numpy(image).movedim(-1, 0), label))
    return images


def plain_loop(images: list[tuple[torch.Tensor, int]], order: np.ndarray) -> nn.Module:
    """Train as everybody would, with our seeds; `order` has the training samples in the order in which they are numbered."""
    resize = v2.Compose([v2.Resize(SIDE, antialias=True), v2.CenterCrop(SIDE)])
    normalize, policy = v2.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4]), v2.RandAugment()
    model = built(build, SEED)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, fused=True)
    for epoch in range(EPOCHS):
        key = ("epoch", epoch)
        numbers = permutation_of(len(order), SEED, *key)
        for begin in range(0, len(order), BATCH):
            batch = numbers[begin : begin + BATCH]
            x = RandomCropFlip(len(order), SEED, key)(torch.stack([resize(images[order[n]][0]) / 255 for n in batch]), batch)
            for row, number in enumerate(batch):
                torch.manual_seed(policy_seed(SEED, "randaugment", key, int(number)))
                x[row] = policy(x[row])
            loss = nn.functional.cross_entropy(model(normalize(x)), torch.tensor([images[order[n]][1] for n in batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


OPTIONS: dict[str, Any] = {
    "method": "exact", "max_gpu_mem": "100MB", "device": "cpu", "epochs": EPOCHS, "batch_size": BATCH, "lr": RATE, "seed": SEED,
    "optimizer": "sgd", "val_fraction": 0.25, "image_size": SIDE, "augment": "randaugment", "normalize": "0.5,0.4,0.3/0.2,0.3,0.4",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[tuple[torch.Tensor, int]]]:
    root = tmp_path_factory.mktemp("images")
    images = write(root / "pictures")
    return root, lowmem_pnn.fit(build, f"imagefolder:{root / 'pictures'}", workdir=root / "run", **OPTIONS), images


def test_training_is_that_of_a_plain_loop(trained: Any) -> None:
    _, result, images = trained
    config = configure(model="resnet18", data=result.data, **{**OPTIONS, "augment": None, "normalize": None})
    splits = open_data(config)[2]
    x, _ = splits["train"].batch(range(9))
    resize = v2.Compose([v2.Resize(SIDE, antialias=True), v2.CenterCrop(SIDE)])
    shown = [resize(image) / 255 for image, _ in images]
    order = np.array([next(number for number, own in enumerate(shown) if torch.equal(own, sample)) for sample in x])
    assert len(set(order)) == 9
    assert_same_weights(loaded(build, result.weights_file), plain_loop(images, order).eval())
    assert result.preprocessing == (
        "decoded to RGB, shorter side resized to 8 (bilinear, antialiased), centre 8x8 kept, uint8 / 255, HWC to CHW, normalised by mean "
        "0.5, 0.4, 0.3 and deviation 0.2, 0.3, 0.4"
    )
    assert result.data_parts == "9 to train on, 3 to validate on (0.25 of the training data, by seed), none to test on"
    assert (result.test_accuracy, result.test_loss) == (None, None)


def test_statistics_are_in_the_result_and_a_test_part_is_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "pictures")
    write(tmp_path / "others", num=6)
    (tmp_path / "own.py").write_text(
        "from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 3))\n"
    )
    done = command(
        "fit --max-gpu-mem 100MB --device cpu --epochs 1 --method exact --model own.py:build --data imagefolder:pictures --test-data "
        "imagefolder:others --image-size 8 --resize pad --normalize auto --augment trivial --workdir run"
    )
    assert done.code == 0, done.err
    assert "data: 11 to train on, 1 to validate on (0.1 of the training data, by seed), 6 to test on" in done.err
    assert re.search(r"normalised by mean 0\.\d+, 0\.\d+, 0\.\d+ and .*, those of 11 training samples\n", done.err)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["preprocessing"] in done.err
    scores = lowmem_pnn.evaluate(tmp_path / "run", trust=True)
    assert {name: scores[name] for name in ("test_loss", "test_accuracy", "test_f1")} == {
        name: result[name] for name in ("test_loss", "test_accuracy", "test_f1")
    }
    changed = command("fit --resume --workdir run --normalize imagenet --trust")
    assert changed.code == 3
    assert changed.fault.startswith(
        "the run in run began with --normalize auto, and --normalize imagenet is given now; leave it out"
    )


def test_processes_that_read_samples_change_nothing(trained: Any) -> None:
    root, result, _ = trained
    display = Messages()
    pickled = lowmem_pnn.fit(build, result.data, workdir=root / "read", workers=2, display=display, **OPTIONS)
    assert_same_weights(loaded(build, pickled.weights_file), loaded(build, result.weights_file))
    assert (pickled.val_loss, pickled.preprocessing, pickled.workers) == (result.val_loss, result.preprocessing, 2)
    assert "2 processes read samples; their memory is the host's, and not in the budget" in "".join(display.texts)
    # Python, torch and torchvision, which the two share.
    assert pickled.host_peak_bytes > pickled.peak_bytes + 100 * 10**6
    assert "samples read by 2 processes of the host" in str(pickled)


def test_a_loader_is_trained_as_it_says(tmp_path: Path) -> None:
    images = torch.from_numpy(image_bytes((3, SIDE, SIDE), num=12))
    samples = [{"image": image, "label": number % 3} for number, image in enumerate(images)]
    options = {**OPTIONS, "image_size": None, "batch_size": None, "epochs": 1, "val_fraction": None}
    loader: Any = DataLoader(Pairs(samples), batch_size=4, shuffle=True)
    by_loader = lowmem_pnn.fit(build, loader, loader, test=loader, workdir=tmp_path / "loader", **options)
    data = (images, torch.arange(12) % 3)
    plain = lowmem_pnn.fit(build, data, data, test=data, workdir=tmp_path / "plain", **{**options, "batch_size": 4})
    assert_same_weights(loaded(build, by_loader.weights_file), loaded(build, plain.weights_file))
    assert (by_loader.test_loss, by_loader.partitions[0]["batch"]) == (plain.test_loss, 4)


def test_masks_in_files_train_as_masks_in_arrays(tmp_path: Path) -> None:
    images = image_bytes((20, 14, 3), num=6)
    masks = (images[:, :, :, 0] // 100).astype(np.uint8)
    for name, files in (("images", images), ("masks", masks)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number, image in enumerate(files):
            Image.fromarray(image).save(tmp_path / "data" / name / f"{number}.png")

    def build_net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))

    options = {**OPTIONS, "augment": "basic", "epochs": 1, "val_fraction": 0}
    files_run = lowmem_pnn.fit(build_net, f"segmentation:{tmp_path / 'data'}", workdir=tmp_path / "files", **options)
    arrays_run = lowmem_pnn.fit(build_net, (images, masks), workdir=tmp_path / "arrays", **options)
    assert_same_weights(loaded(build_net, files_run.weights_file), loaded(build_net, arrays_run.weights_file))


def test_an_image_that_is_decoded_here_is_in_the_plan(tmp_path: Path) -> None:
    write(tmp_path / "pictures")
    Image.new("RGB", (1000, 700)).save(tmp_path / "pictures" / "a" / "large.png")

    def predicted(**options: Any) -> int:
        plan = lowmem_pnn.plan(build, f"imagefolder:{tmp_path / 'pictures'}", timing=False, **{**OPTIONS, **options})
        return plan.predicted_peak_bytes

    assert predicted() >= predicted(workers=1) + 18 * 700_000
