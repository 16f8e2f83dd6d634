"""What benches train on random samples: a network, its data, and a batch at which one would train it."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Network:
    """What is trained.

    Args:
        model: as `--model` takes it.
        data: `images` (32x32, three channels), `grey` (one) or `text`.
        batch: samples a step.
        model_arg: for its factory.
        context: tokens of a sample, of text.
    """

    model: str
    data: str
    batch: int
    model_arg: Mapping[str, Any] = field(default_factory=dict)
    context: int = 256


def make_data(network: Network, samples: int, folder: Path) -> str:
    """Random samples, as `--data` takes them.

    Args:
        network: that trains on them.
        samples: at least so many.
        folder: where their file goes.
    """
    random = np.random.Generator(np.random.Philox(0))
    if network.data == "text":
        file = folder / "text"
        file.write_bytes(random.bytes(samples * network.context * 2))
        return f"text:{file}"
    shape = (samples, 32, 32) if network.data == "grey" else (samples, 32, 32, 3)
    x, y = random.integers(256, size=shape, dtype=np.uint8), random.integers(10, size=samples)
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x[:16], y_test=y[:16])
    return f"npz:{folder / 'data.npz'}"


def fields_of(network: Network, folder: Path, steps: int, epochs: int) -> dict[str, Any]:
    """Fields of `FitConfig` for training a network for so many steps an epoch, on samples that are made in a folder."""
    samples = network.batch * steps
    given = {"model_arg": dict(network.model_arg)} if network.model_arg else {}
    return {
        "model": network.model,
        **given,
        "data": make_data(network, samples, folder),
        "batch_size": network.batch,
        "train_limit": samples,
        "test_limit": 8,
        "epochs": epochs,
        "lr": 1e-4,
        "val_fraction": 0.0,
    }


def chosen(parser: argparse.ArgumentParser, only: str | None, networks: Mapping[str, Network]) -> list[str]:
    """The names in a comma list, or all; the parser ends the program at one that is none."""
    names = only.split(",") if only else list(networks)
    for name in names:
        if name not in networks:
            parser.error(f"--only {name} is none of {', '.join(networks)}")
    return names
