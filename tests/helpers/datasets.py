"""Data sets for tests: splits of numbered samples, arrays in files, windows of tokens, map-style data."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from lowmem_pnn.sources.map_split import from_torch

NOWHERE = Path("no-such-root")


def numbered(length: int) -> Any:
    """A split whose sample i holds i, of class i."""
    return from_torch((torch.arange(float(length)).reshape(-1, 1), torch.arange(length)))


def everything(split: Any) -> tuple[Tensor, Tensor]:
    return split.batch(range(len(split)))


def save(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


def image_bytes(shape: tuple[int, ...], num: int = 6) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (num, *shape)).astype(np.uint8)


class Pairs(TorchDataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def token_windows(length: int = 6, context: int = 4) -> tuple[Tensor, Tensor]:
    """Windows of 0, 1, 2, ... and what comes next."""
    numbers = torch.arange(length * context + 1)
    return numbers[:-1].clone().reshape(length, context), numbers[1:].clone().reshape(length, context)


class Drawn(Pairs):
    """Map-style data whose samples are flipped, shifted and scaled at random, by three generators."""

    def __getitem__(self, index: int) -> Any:
        x, label = self.items[index]
        x = x.flip(-1) if torch.rand(1) < 0.5 else x
        return x * (1 + random.random()) + np.random.rand(), label
