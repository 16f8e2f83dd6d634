"""Whole runs on data that people bring: folders of images, broken samples, whole numbers."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import lowmem_pnn
from helpers.commands import lowmem_pnn as command
from helpers.displays import Messages
from lowmem_pnn.errors import CheckpointError, DataError
from lowmem_pnn.reporting.progress import Display

OPTIONS: dict[str, Any] = {
    "max_gpu_mem": "100MB", "device": "cpu", "method": "exact", "epochs": 2, "batch_size": 4, "commit_every": 0, "log_every": 1,
}  # fmt: skip


def write_images(folder: Path, sizes: dict[str, int]) -> None:
    random = np.random.RandomState(0)
    for part, size in sizes.items():
        for label, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for number in range(size):
                pixels = random.randint(0, 200, (8, 8, 3)) + 55 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{number}.png")


def spoil(path: Path) -> bytes:
    """Damage what only decoding finds; return what was there."""
    whole = path.read_bytes()
    place = whole.index(b"IDAT") + 4
    path.write_bytes(whole[:place] + b"\xff" * 8 + whole[place + 8 :])
    return whole


def test_a_broken_image_of_the_test_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "data", {"train": 8, "val": 3, "test": 4})
    (tmp_path / "data" / "test" / "dog" / "2.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    line = (
        "fit --model mlp:192-8-2 --data imagefolder:data --max-gpu-mem 100MB --device cpu --method exact --epochs 2 --batch-size 4 "
        "--workdir run"
    )
    refused = command(line)
    assert refused.code == 3
    assert "test/dog/2.png cannot be read as an image (" in refused.fault
    assert refused.fault.endswith("; 1 of 30 images cannot be used, --skip-broken leaves them out")
    assert not Path("run").exists()
    planned = command("plan --no-timing" + line.removeprefix("fit").removesuffix(" --workdir run") + " --skip-broken")
    assert f"left out 1 broken sample: {tmp_path}/data/test/dog/2.png" in planned.out
    done = command(line + " --skip-broken")
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    assert lines[1:3] == [
        "reading every sample once, to leave out broken ones (--skip-broken)",
        f"left out 1 broken sample: {tmp_path}/data/test/dog/2.png",
    ]
    assert lines[2] in done.out.splitlines()
    result = json.loads(Path("run/result.json").read_text())
    assert result["skipped_samples"] == {"count": 1, "names": [f"{tmp_path}/data/test/dog/2.png"]}


def test_each_part_of_a_folder_is_used_for_what_it_is(tmp_path: Path) -> None:
    write_images(tmp_path / "data", {"Training": 8, "validation": 3, "test": 4})
    run = lowmem_pnn.fit("mlp:192-8-2", f"imagefolder:{tmp_path}/data", workdir=tmp_path / "run", **OPTIONS)
    from safetensors.torch import load_file

    model = nn.Sequential(nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 2))
    model.load_state_dict(load_file(run.weights_file))
    found = {}
    for part in ("validation", "test"):
        files = sorted((tmp_path / "data" / part).rglob("*.png"))
        x = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).flatten() for file in files]) / 255
        y = torch.tensor([int(file.parent.name == "dog") for file in files])
        with torch.no_grad():
            found[part] = F.cross_entropy(model(x), y).item(), (model(x).argmax(1) == y).float().mean().item()
    assert (run.val_loss, run.val_accuracy) == pytest.approx(found["validation"], abs=1e-6)
    assert (run.test_loss, run.test_accuracy) == pytest.approx(found["test"], abs=1e-6)
    assert run.skipped_samples == {"count": 0, "names": []}


def test_an_image_that_fails_in_training_stops_a_run_that_can_go_on(tmp_path: Path) -> None:
    write_images(tmp_path / "data", {"train": 12})
    path = tmp_path / "data" / "train" / "dog" / "7.png"
    data, workdir = f"imagefolder:{tmp_path}/data", tmp_path / "run"
    options = {**OPTIONS, "val_fraction": 0.0}
    whole = lowmem_pnn.fit("mlp:192-8-2", data, workdir=tmp_path / "whole", **options)

    class Spoils(Display):
        def end_epoch(self, line: dict[str, Any]) -> None:
            status = path.stat()
            self.before = spoil(path), (status.st_atime_ns, status.st_mtime_ns)

    display = Spoils()
    with pytest.raises(
        DataError, match=r"dog/7.png cannot be read as an image \(.+\); repair or remove it, or begin again with --skip-broken$"
    ) as raised:
        lowmem_pnn.fit("mlp:192-8-2", data, workdir=workdir, display=display, **options)
    assert raised.value.exit_code == 3
    path.unlink()
    with pytest.raises(
        CheckpointError,
        match=r"is not what the run in .* began with \(samples then train=24, now train=23\); bring it back, or begin",
    ):
        lowmem_pnn.fit("mlp:192-8-2", data, workdir=workdir, resume=True, max_gpu_mem="100MB")
    path.write_bytes(display.before[0])
    os.utime(path, ns=display.before[1])
    again = lowmem_pnn.fit("mlp:192-8-2", data, workdir=workdir, resume=True, max_gpu_mem="100MB")
    assert again.resumed == 1
    assert Path(again.weights_file).read_bytes() == Path(whole.weights_file).read_bytes()


def test_broken_samples_from_python_are_left_out_of_the_training(tmp_path: Path) -> None:
    x, y = torch.rand(24, 6), torch.arange(24) % 3
    broken = x.clone()
    broken[[3, 20]] = float("nan")
    left = [number for number in range(24) if number not in (3, 20)]
    runs = [
        lowmem_pnn.fit("mlp:6-8-3", data, workdir=tmp_path / name, display=display, **OPTIONS, **more)
        for name, data, display, more in (
            ("clean", (x[left], y[left]), Messages(), {}),
            ("skipped", (broken, y), Messages(), {"skip_broken": True}),
        )
    ]
    assert Path(runs[0].weights_file).read_bytes() == Path(runs[1].weights_file).read_bytes()
    assert runs[1].skipped_samples["count"] == 2
    assert "left out 2 broken samples: sample 3 of python:tuple (training part), sample 20 of " in str(runs[1])


@pytest.mark.parametrize("method", ["pnn", "exact"])
def test_a_table_of_whole_numbers_is_trained_on_as_floats(method: str, tmp_path: Path) -> None:
    x, y = torch.arange(168).reshape(24, 7) % 5, torch.arange(24) % 3

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 3))

    runs = [
        lowmem_pnn.fit(build, (data, y), test=(data, y), workdir=tmp_path / str(data.dtype), **{**OPTIONS, "method": method})
        for data in (x, x.float())
    ]
    assert [run.preprocessing for run in runs] == ["int64 to float32", "float32 as it is"]
    assert Path(runs[0].weights_file).read_bytes() == Path(runs[1].weights_file).read_bytes()
    assert runs[0].test_loss == runs[1].test_loss


@pytest.mark.parametrize("method", ["pnn", "neuroflux", "incubate", "exact", "backprop"])
def test_a_last_sample_joins_the_batch_before_it_where_a_norm_needs_two(method: str, tmp_path: Path) -> None:
    x, y = torch.rand(17, 6), torch.arange(17) % 3

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))

    run = lowmem_pnn.fit(build, (x, y), workdir=tmp_path / "run", **{**OPTIONS, "method": method, "val_fraction": 0.0})
    assert run.train_loss is not None
    assert run.train_loss < 2
