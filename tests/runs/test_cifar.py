"""The cifar models by the command line: planned, trained, refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import lowmem_pnn


@pytest.fixture
def data(tmp_path: Path) -> Callable[[int], str]:
    def write(side: int) -> str:
        random = np.random.RandomState(0)
        x, y = random.randint(0, 256, (24, side, side, 3), dtype=np.uint8), np.arange(24) % 4
        np.savez(tmp_path / f"{side}.npz", x_train=x, y_train=y, x_test=x[:8], y_test=y[:8])
        return f"npz:{tmp_path}/{side}.npz"

    return write


def test_one_is_planned(data: Callable[[int], str]) -> None:
    spec = "cifar-vgg16"
    where = f"--max-gpu-mem 300MB --device cpu --no-timing --data {data(32)}"
    done = lowmem_pnn(f"plan {where} --model {spec} --model-arg width=0.25")
    assert done.code == 0, done.err
    assert spec in done.out


def test_one_is_trained(data: Callable[[int], str], tmp_path: Path) -> None:
    arguments = f"--max-gpu-mem 100MB --device cpu --epochs 1 --cuts layer3.0 --data {data(32)} --workdir {tmp_path}/run"
    done = lowmem_pnn(f"fit {arguments} --model cifar-resnet18 --model-arg width=0.125")
    assert done.code == 0, done.err
    assert lowmem_pnn(f"evaluate {tmp_path}/run").code == 0


def test_images_that_are_too_small_are_refused(data: Callable[[int], str]) -> None:
    done = lowmem_pnn(f"plan --max-gpu-mem 300MB --device cpu --model cifar-vgg11 --data {data(28)}")
    assert done.code == 3
    assert "does not run on samples of (3, 28, 28) float32 in train mode, at 'features.28'" in done.fault
