"""Deep Incubation in plain PyTorch, against which `--method incubate` is held."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from helpers.plainloops import built, cross_entropy, order_of_partition, parts_at, train_plainly, training_split
from helpers.small_networks import Data
from lowmem_pnn.config.configure import configure
from lowmem_pnn.seeds import permutation_of, seed_of


def thin_conv(seed: int) -> nn.Sequential:
    """The meta model of `small_conv` in partitions of one, one and two layers."""
    makers: list[Callable[[], nn.Module]] = [
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        lambda: nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(32, 192), nn.ReLU(),
        ),
        lambda: nn.Sequential(nn.Linear(192, 4)),
    ]  # fmt: skip
    return _seeded(makers, seed)


def thin_mlp(seed: int) -> nn.Sequential:
    """The meta model of `small_mlp` in partitions of one and two layers."""
    return _seeded([lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU()), lambda: nn.Sequential(nn.Linear(20, 4))], seed)


def _seeded(makers: list[Callable[[], nn.Module]], seed: int) -> nn.Sequential:
    parts = []
    for number, make in enumerate(makers):
        torch.manual_seed(seed_of(seed, "thin", number))
        parts.append(make())
    return nn.Sequential(*parts)


def train_by_incubate(
    build: Callable[[], nn.Module], thin: Callable[[int], nn.Sequential], starts: list[int], data: Data, **options: Any
) -> tuple[nn.Module, nn.Sequential]:
    """What `--method incubate` is to give for a Sequential that is cut before the modules `starts`; and the meta model.

    Args:
        build: makes the model.
        thin: makes the meta model from a seed, a module for each partition.
        starts: modules that start a partition.
        data: samples and labels.
        **options: of the run, without recovery.
    """
    options = {"method": "incubate", **options}
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)
    split = training_split(data, **options)
    model = built(build, config.seed)
    assert isinstance(model, nn.Sequential)
    meta = thin(config.seed)
    train_plainly(
        meta,
        split.batch,
        order_of_partition(config, 0, len(split), written=False),
        config,
        epochs=config.num_meta_epochs,
    )
    meta.eval().requires_grad_(False)
    inputs, labels = split.batch(np.arange(len(split)))
    own_order = permutation_of(len(split), config.seed, "own order")
    for partition, part in enumerate(parts_at(model, starts)):
        tail = meta[partition + 1 :]

        def loss_of(output: Tensor, y: Tensor, tail: nn.Sequential = tail) -> Tensor:
            return cross_entropy(config, tail(output), y)

        train_plainly(
            part,
            lambda indices, x=inputs, y=labels: (x[indices], y[indices]),  # type: ignore[misc]
            order_of_partition(config, partition, len(split), partition > 0),
            config,
            partition=partition,
            loss_of=functools.partial(loss_of),
        )
        if partition == 0:
            inputs, labels = inputs[own_order], labels[own_order]
        size = config.value_for("batch_size", partition)
        pieces = [piece for batch in inputs.split(size) for piece in batch.split(config.micro_batch or size)]
        inputs = torch.cat([meta[partition](piece.clone()) for piece in pieces])
    return model, meta
