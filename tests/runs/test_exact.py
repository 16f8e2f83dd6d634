"""Exact training: whatever the cuts, the optimizer and the micro-batches, the bits are those of a loop in plain PyTorch."""

import functools
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.exact_runs import COMMON, KINDS, check_equal, fit, num_layers
from helpers.plainloops import assert_same_weights, loaded, train_by_exact, training_split
from helpers.small_networks import (
    TiedThrice,
    images,
    small_conv,
    small_gpt,
    small_mlp,
    tokens,
    vectors,
)
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.stores.tensor_file import TensorFile

# Cuts, networks, optimizers.


@pytest.mark.parametrize("kind", KINDS)
def test_exact_with_a_partition_for_every_layer_is_same_as_plain_pytorch(kind: str, tmp_path: Path) -> None:
    build, data = KINDS[kind].build, KINDS[kind].data
    layers = num_layers(build, data)
    assert layers >= 3
    cuts = ",".join(map(str, range(1, layers)))
    options = {**COMMON, "cuts": cuts, "micro_batch": 4, "compare": True}
    check_equal(build, data, tmp_path / "run", {"smallest": KINDS[kind].smallest}, **options)


@pytest.mark.parametrize(("kind", "cuts"), [("conv", "1,3"), ("vit", "2"), ("unet", "1,3"), ("gpt", "2")])
def test_exact_with_partitions_of_some_layers_is_same_as_plain_pytorch(kind: str, cuts: str, tmp_path: Path) -> None:
    check_equal(KINDS[kind].build, KINDS[kind].data, tmp_path / "run", cuts=cuts, **COMMON)


def test_exact_in_one_partition_is_same_as_plain_pytorch(tmp_path: Path) -> None:
    check_equal(small_conv, images(), tmp_path / "run", partitions=1, micro_batch=4, **COMMON)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "loops"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_exact_is_same_as_plain_pytorch_with_every_optimizer(optimizer: str, fused: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **COMMON, "optimizer": optimizer, "fused": fused, "weight_decay": 0.02, "micro_batch": 4,
    }  # fmt: skip
    if optimizer == "sgd":
        options["momentum"] = 0.8
    check_equal(small_conv, images(), tmp_path / "run", partitions=3, **options)


def test_one_partition_that_commits_after_every_batch_keeps_its_state(tmp_path: Path) -> None:
    expected = train_by_exact(KINDS["conv"].build, KINDS["conv"].data, **COMMON)
    result = fit(KINDS["conv"].build, KINDS["conv"].data, tmp_path / "run", partitions=1, commit_every=0.0, **COMMON)
    assert_same_weights(loaded(KINDS["conv"].build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


class _SharesBuffers(nn.Module):
    """Layers that use one buffer, which the forward of the second may change."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 12))
        self.blocks = nn.Sequential(*(self.Block(self.scale, changes and number == 1) for number in range(3)), nn.Linear(12, 4))

    class Block(nn.Module):
        def __init__(self, scale: Tensor, changes: bool) -> None:
            super().__init__()
            self.linear = nn.Linear(12, 12)
            self.register_buffer("scale", scale)
            self.changes, self.calls = changes, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.changes and self.calls == 3:
                self.scale.add_(0.01)
            return self.linear(x) * self.scale.clone()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.blocks(x)
        return scores


def test_a_buffer_of_several_partitions_is_kept_once_and_must_not_change(tmp_path: Path) -> None:
    options: dict[str, Any] = {**COMMON, "cuts": "1,2"}
    build = functools.partial(_SharesBuffers, changes=False)
    result = fit(build, vectors(), tmp_path / "constant", **options)
    assert_same_weights(loaded(build, result.weights_file), train_by_exact(build, vectors(), **options).model)
    with pytest.raises(CaptureError, match=r"buffer 'scale' is used on both sides of a cut, and a forward changes it"):
        fit(functools.partial(_SharesBuffers, changes=True), vectors(), tmp_path / "changing", **options)


def test_a_slow_disk_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What waits to be written must not be changed by what is computed meanwhile.
    write = TensorFile.write_from

    def slowly(self: TensorFile, *arguments: Any) -> None:
        time.sleep(0.003)
        write(self, *arguments)

    monkeypatch.setattr(TensorFile, "write_from", slowly)
    check_equal(small_conv, images(), tmp_path / "run", cuts="1,3", **COMMON)


def test_sgd_without_momentum_and_partitions_with_learning_rates_of_their_own(tmp_path: Path) -> None:
    def parts_of(model: Any) -> list[list[nn.Parameter]]:
        return [list(model[start:stop].parameters()) for start, stop in itertools.pairwise((0, 2, 4, 5))]

    options = {**COMMON, "optimizer": "sgd", "momentum": 0.0, "lr": (0.05, 0.1, 0.02), "cuts": "1,2"}
    check_equal(small_mlp, vectors(), tmp_path / "run", {"parts_of": parts_of}, **options)


def test_exact_is_same_as_backprop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever kernel PyTorch clips: on a GPU it takes the norms of all gradients by one that rounds otherwise, as here."""

    def norms(tensors: list[Tensor], order: float) -> list[Tensor]:
        return [torch.linalg.vector_norm(tensor, order) * (1.0001 if tensor.numel() > 1 else 1.0) for tensor in tensors]

    monkeypatch.setattr(torch.nn.utils.clip_grad, "_has_foreach_support", lambda tensors, device: True)
    monkeypatch.setattr(torch, "_foreach_norm", norms)
    options = {**COMMON, "micro_batch": 5, "clip_norm": 0.3, "lr_schedule": "cosine", "label_smoothing": 0.1}
    exact = fit(small_conv, images(), tmp_path / "exact", cuts="1,2,3", test=images(30, seed=1), **options)
    whole = fit(small_conv, images(), tmp_path / "whole", method="backprop", test=images(30, seed=1), **options)
    assert_same_weights(loaded(small_conv, exact.weights_file), loaded(small_conv, whole.weights_file))
    for name in ("train_loss", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "test_f1"):
        assert getattr(exact, name) == getattr(whole, name) is not None, name


@pytest.mark.parametrize("micro_batch", [9, 4])
def test_a_rest_that_is_too_small_for_batchnorm_joins_what_comes_before_it_or_is_left_out(
    micro_batch: int, tmp_path: Path
) -> None:
    # Of 37 samples, batches of 9 leave one over; micro-batches of 4 leave one of every batch over.
    options = {**COMMON, "val_fraction": 0.075, "batch_size": 9, "micro_batch": micro_batch, "cuts": "1,3"}
    assert len(training_split(images(), **options, method="exact")) == 37
    check_equal(small_conv, images(), tmp_path / "run", {"smallest": 2}, **options)


def test_a_model_larger_than_its_budget_is_cut_by_itself_and_is_same_as_plain_pytorch(tmp_path: Path) -> None:
    def build() -> nn.Module:
        widths = (12, 900, 900, 900, 900, 4)
        layers = [module for ends in itertools.pairwise(widths) for module in (nn.Linear(*ends), nn.ReLU())]
        return nn.Sequential(*layers[:-1])

    options: dict[str, Any] = {"epochs": 1, "batch_size": 20, "lr": 1e-3, "val_fraction": 0.1}
    result = fit(build, vectors(), tmp_path / "run", max_gpu_mem="36MB", **options)
    assert result.training_state_bytes > 38_000_000
    assert len(result.partitions) > 1
    expected = train_by_exact(build, vectors(), **options)
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


# Frozen and shared weights.


def frozen_conv(*frozen: int) -> nn.Module:
    """The small network with some modules frozen; in training its BatchNorm goes on counting."""
    model = small_conv()
    assert isinstance(model, nn.Sequential)
    for number in frozen:
        model[number].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("frozen", "cuts"),
    [((0, 1, 4, 5), "1,2,3"), ((4, 5, 9, 10), "1,2,3"), ((1, 9), "2")],
    ids=["first", "middle", "scattered"],
)
def test_frozen_parameters_stay_and_the_gradient_passes_through_them(frozen: tuple[int, ...], cuts: str, tmp_path: Path) -> None:
    build = functools.partial(frozen_conv, *frozen)
    check_equal(build, images(), tmp_path / "run", {"smallest": 2}, cuts=cuts, micro_batch=5, clip_norm=0.5, **COMMON)


@pytest.mark.parametrize(
    ("cuts", "options"),
    [
        ("1", {}),
        ("1,2,3,4,5", {"micro_batch": 3}),
        ("1,2,3,4,5", {"micro_batch": 3, "clip_norm": 0.2}),
        ("3", {"clip_norm": 0.2}),
    ],
    ids=["whole", "accumulated", "clipped", "clipped-whole"],
)
def test_an_embedding_that_is_tied_to_the_head_is_same_as_in_plain_pytorch(
    cuts: str, options: dict[str, Any], tmp_path: Path
) -> None:
    build = functools.partial(small_gpt, tied=True)
    assert num_layers(build, tokens()) == 6
    check_equal(build, tokens(), tmp_path / "run", cuts=cuts, **options, **COMMON)


@pytest.mark.parametrize("cuts", ["1,2,3", "1,3", "2"])
def test_a_weight_that_several_partitions_use_several_times_accumulates_as_in_plain_pytorch(cuts: str, tmp_path: Path) -> None:
    # Plain PyTorch adds up a tied weight's gradients use by use, and then micro-batch by micro-batch: the order decides the last bits.
    check_equal(TiedThrice, vectors(), tmp_path / "run", cuts=cuts, micro_batch=3, **{**COMMON, "optimizer": "sgd"})
