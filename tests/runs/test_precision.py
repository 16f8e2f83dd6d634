"""Precision: layers under autocast, the loss's scale, maps that lie position by position."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowmem_pnn
from helpers.plainloops import assert_same_weights, built, loaded, stop_at, train_by_exact
from helpers.small_networks import (
    Data,
    Overflows,
    images,
    small_conv,
    small_gpt,
    small_mlp,
    small_resnet,
    small_vit,
    tokens,
    vectors,
)
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.process import Process
from lowmem_pnn.training import start

COMMON: dict[str, Any] = {"epochs": 2, "batch_size": 12, "lr": 0.01, "seed": 3, "val_fraction": 0.1}


def fit(build: Callable[[], nn.Module], data: Data, folder: Path, **options: Any) -> Result:
    options = {"method": "exact", "max_gpu_mem": "400MB", "device": "cpu", **options}
    return lowmem_pnn.fit(build, data, workdir=folder, **options)


@pytest.mark.parametrize(
    ("precision", "build", "data", "cuts"),
    [
        ("fp16", small_mlp, vectors(), "1,2"),
        ("bf16", small_conv, images(), "1,3"),
        ("fp16", small_conv, images(), "1,3"),
        ("bf16", small_resnet, images(), "1,2,3"),
        ("bf16", small_vit, images(), "2"),
        ("fp16", small_vit, images(), "2"),
        pytest.param("fp16", small_conv, images(), "1,3", marks=pytest.mark.resident),
        pytest.param("bf16", small_mlp, vectors(), "1,2", marks=pytest.mark.resident),
    ],
    ids=["mlp-fp16", "conv-bf16", "conv-fp16", "resnet-bf16", "vit-bf16", "vit-fp16", "conv-fp16-resident", "mlp-bf16-resident"],
)
def test_exact_is_same_as_plain_autocast(
    precision: str, build: Callable[[], nn.Module], data: Data, cuts: str, tmp_path: Path
) -> None:
    options = {**COMMON, "precision": precision, "cuts": cuts, "micro_batch": 6}
    result = fit(build, data, tmp_path / "run", **options)
    assert len(result.partitions) == cuts.count(",") + 2
    expected = train_by_exact(build, data, **options)
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss
    full = train_by_exact(build, data, **{**options, "precision": "fp32"})
    assert result.train_loss != full.train_loss
    assert result.train_loss == pytest.approx(full.train_loss, rel=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_clipping_and_chunks_are_those_of_plain_autocast(precision: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return small_gpt(tied=False)

    options = {**COMMON, "precision": precision, "cuts": "1,2", "clip_norm": 0.5, "loss_chunk": 40}
    result = fit(build, tokens(), tmp_path / "run", **options)
    # The plain loop takes the whole layer at once: its sums are in another order.
    expected = train_by_exact(build, tokens(), **{**options, "loss_chunk": None})
    assert result.train_loss == pytest.approx(expected.train_loss, rel=1e-2)
    for name, tensor in loaded(build, result.weights_file).named_parameters():
        assert torch.allclose(tensor, expected.model.get_parameter(name), atol=0.03), name


@pytest.mark.parametrize(("method", "precision"), [("pnn", "bf16"), ("pnn", "fp16"), ("neuroflux", "fp16"), ("backprop", "fp16")])
def test_every_method_learns_in_lower_precision(method: str, precision: str, tmp_path: Path) -> None:
    options = {"epochs": 6, "batch_size": 12, "lr": 0.01, "val_fraction": 0.1, "method": method, "precision": precision}
    if method != "backprop":
        options["cuts"] = "2"
    result = fit(small_conv, images(120), tmp_path / "run", test=images(60, seed=1), **options)
    assert result.test_accuracy is not None
    assert result.test_accuracy > 0.8  # of four classes
    if method != "backprop":
        expected = 2 * 12 * 16  # the boundary's values, of 2 bytes, at 108 samples to train on and 12 to validate
        assert result.partitions[0]["activation_bytes"] == 120 * expected
    weights = loaded(small_conv, result.weights_file)
    assert {tensor.dtype for tensor in weights.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["exact", pytest.param("exact", marks=pytest.mark.resident, id="exact-resident"), "backprop"])
def test_steps_that_overflow_are_left_out_as_plain_scaling_leaves_them_out(method: str, tmp_path: Path) -> None:
    options = {**COMMON, "precision": "fp16", "clip_norm": 1.0}
    result = fit(Overflows, vectors(), tmp_path / "run", method=method, **options, **({"cuts": "1"} if method == "exact" else {}))
    expected = train_by_exact(Overflows, vectors(), **options)
    assert_same_weights(loaded(Overflows, result.weights_file), expected.model)
    assert result.skipped_steps > 0


@pytest.mark.parametrize(("method", "options"), [("exact", {"cuts": "1,2"}), ("backprop", {})])
def test_a_loss_that_overflows_has_its_step_left_out_as_plain_scaling_has_it(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    x, y = vectors()
    x[5] *= 1e6  # above float16's largest number
    options = {**COMMON, "precision": "fp16", "val_fraction": 0.0, **options}
    result = fit(small_mlp, (x, y), tmp_path / "run", method=method, **options)
    options.pop("cuts", None)
    assert_same_weights(loaded(small_mlp, result.weights_file), train_by_exact(small_mlp, (x, y), **options).model)
    assert result.skipped_steps >= 2
    assert result.train_loss is not None
    assert math.isfinite(result.train_loss)


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else (100 * x).exp()


def test_a_validation_loss_that_is_not_finite_ends_no_training(tmp_path: Path) -> None:
    x, y = vectors()
    far = x.clone()
    far[0] = 1e4
    build = lambda: nn.Sequential(nn.Linear(12, 4), Exponential())  # noqa: E731
    result = lowmem_pnn.fit(
        build,
        (x, y),
        (far, y),
        test=(far, y),
        max_gpu_mem="400MB",
        device="cpu",
        method="exact",
        epochs=2,
        workdir=tmp_path / "run",
    )
    assert result.val_loss is None
    assert result.test_loss is None
    assert result.test_accuracy is not None


def test_the_scale_outlives_a_stop(tmp_path: Path) -> None:
    x, y = vectors()
    np.savez(tmp_path / "data.npz", x_train=x.numpy(), y_train=y.numpy())
    config = configure(
        max_gpu_mem="400MB", device="cpu", method="exact", precision="fp16", cuts="1", commit_every=0.0,
        model="helpers.small_networks:Overflows", data=f"npz:{tmp_path / 'data.npz'}", **COMMON,
    )  # fmt: skip
    whole = start.begin(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        start.begin(config, tmp_path / "run", process=Process(should_stop=stop_at(3)))
    resumed = start.resume(tmp_path / "run", trust=True)
    assert whole is not None
    assert resumed is not None
    assert resumed.resumed == 1
    assert whole.skipped_steps > 0
    assert resumed.skipped_steps == whole.skipped_steps
    assert_same_weights(loaded(Overflows, resumed.weights_file), loaded(Overflows, whole.weights_file))


def test_built_models_stay_float32(tmp_path: Path) -> None:
    result = fit(small_mlp, vectors(), tmp_path / "run", precision="bf16", cuts="1", **COMMON)
    model = built(small_mlp, 3)
    assert {t.dtype for t in loaded(small_mlp, result.weights_file).parameters()} == {t.dtype for t in model.parameters()}


# Channels last.


class _Map(nn.Module):
    """A model that is given its maps position by position."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.model = build()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x.contiguous(memory_format=torch.channels_last))
        return scores


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("build", [small_conv, small_resnet], ids=["conv", "resnet"])
def test_exact_is_same_as_plain_pytorch_with_channels_last(
    build: Callable[[], nn.Module], precision: str, tmp_path: Path
) -> None:
    options = {**COMMON, "precision": precision, "micro_batch": 6}
    result = fit(build, images(), tmp_path / "run", channels_last=True, cuts="1,2", **options)
    expected = train_by_exact(lambda: _Map(build), images(), **options)
    assert_same_weights(loaded(build, result.weights_file), expected.model.get_submodule("model"))
    assert result.train_loss == expected.train_loss


def test_other_methods_learn_with_channels_last(tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 6, "batch_size": 12, "lr": 0.01, "val_fraction": 0.1, "cuts": "2"}
    for method in ("pnn", "neuroflux"):
        folder = tmp_path / method
        result = fit(small_conv, images(120), folder, test=images(60, seed=1), method=method, channels_last=True, **options)
        assert result.test_accuracy is not None
        assert result.test_accuracy > 0.8


def test_channels_last_needs_maps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--channels-last has no effect here: .* has no convolutions of maps"):
        fit(small_mlp, vectors(), tmp_path / "run", channels_last=True, **COMMON)
