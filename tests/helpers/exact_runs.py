"""Runs of exact training and what they are held against: networks with their data, and the plain loop."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowmem_pnn
from helpers.plainloops import Trained, assert_same_weights, built, loaded, train_by_exact
from helpers.small_networks import (
    Data,
    Masked,
    SmallUnet,
    averaging_mlp,
    images,
    small_conv,
    small_convnext,
    small_densenet,
    small_gpt,
    small_mlp,
    small_mobilenet,
    small_resnet,
    small_vit,
    tokens,
    vectors,
)
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.reporting.result import Result


@dataclass
class Kind:
    """A network and its data.

    Args:
        build: makes the model.
        data: samples and labels.
        smallest: samples that it accepts at least.
    """

    build: Callable[[], nn.Module]
    data: Data
    smallest: int = 1


KINDS = {
    "mlp": Kind(small_mlp, vectors()),
    "conv": Kind(small_conv, images(), smallest=2),
    "resnet": Kind(small_resnet, images(), smallest=2),
    "mobilenet": Kind(small_mobilenet, images(side=16), smallest=2),
    "vit": Kind(small_vit, images()),
    "convnext": Kind(small_convnext, images(side=16)),
    "densenet": Kind(small_densenet, images(side=16), smallest=2),
    "unet": Kind(SmallUnet, images()),
    "averaging": Kind(averaging_mlp, vectors()),
    "masked": Kind(Masked, tokens()),
    "gpt": Kind(functools.partial(small_gpt, tied=False), tokens()),
}
# 36 samples for training, of 40, make a short last batch, and every batch a short last micro-batch.
COMMON: dict[str, Any] = {"epochs": 2, "batch_size": 10, "lr": 0.01, "seed": 3, "val_fraction": 0.1}


def fit(build: Callable[[], nn.Module], data: Any, folder: Path, **options: Any) -> Result:
    options = {"method": "exact", "max_gpu_mem": "400MB", "device": "cpu", **options}
    return lowmem_pnn.fit(build, data, workdir=folder, **options)


def num_layers(build: Callable[[], nn.Module], data: Data) -> int:
    with torch.device("meta"):
        model = build()
    return len(capture(model, TensorSpec(tuple(data[0].shape[1:]), data[0].dtype)).layers)


def check_equal(
    build: Callable[[], nn.Module], data: Data, folder: Path, plain: dict[str, Any] | None = None, **options: Any
) -> Trained:
    """A run has the weights, buffers and training loss of the plain loop, which moved them; the plain loop's are returned.

    It is not compared before training unless that is asked for: it is here.
    """
    result = fit(build, data, folder, **{"compare": False, **options})
    expected = train_by_exact(build, data, **(plain or {}), **options)
    assert result.oom_retries == 0
    assert len(result.partitions) == options.get("partitions", options.get("cuts", "").count(",") + 2)
    assert {part["micro_batch"] for part in result.partitions} == {options.get("micro_batch") or options["batch_size"]}
    start = built(build, options.get("seed", 0)).state_dict()
    for name, tensor in expected.model.named_parameters():
        # What comes before BatchNorm has no use for a bias.
        assert not tensor.requires_grad or tensor.ndim < 2 or not torch.equal(tensor, start[name]), f"{name} did not move"
        assert tensor.requires_grad or torch.equal(tensor, start[name]), f"{name} is frozen"
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss
    return expected
