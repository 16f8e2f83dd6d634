"""Training as a whole: the same bits as plain PyTorch, partitions left alone once trained, and weights that anybody can load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import plainloops
import pytest
import torch
from plainloops import Data, assert_same_weights, images, loaded, small_conv, small_mlp, train_by_backprop, train_by_pnn, vectors
from torch import nn

import lowmem_pnn
from lowmem_pnn.errors import CaptureError, ConfigError
from lowmem_pnn.report import Result

KINDS: dict[str, tuple[Callable[[], nn.Module], Data]] = {"mlp": (small_mlp, vectors()), "conv": (small_conv, images())}


def fit(build: Callable[[], nn.Module], data: Data, folder: Path, **options: Any) -> Result:
    return lowmem_pnn.fit(build, data, max_gpu_mem="400MB", device="cpu", workdir=folder, **options)


@pytest.mark.parametrize("micro_batch", [None, 4], ids=["whole", "accumulated"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "loops"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("kind", KINDS)
def test_backprop_is_same_as_plain_pytorch(
    kind: str, optimizer: str, fused: bool, micro_batch: int | None, tmp_path: Path
) -> None:
    build, data = KINDS[kind]
    # 36 samples make a short last batch, and every batch a short last micro-batch.
    options: dict[str, Any] = {
        "optimizer": optimizer, "fused": fused, "micro_batch": micro_batch, "epochs": 2, "batch_size": 10, "weight_decay": 0.01,
        "lr": 0.01, "seed": 3,
    }  # fmt: skip
    result = fit(build, data, tmp_path / "run", method="backprop", **options)
    assert result.oom_retries == 0
    assert [part["micro_batch"] for part in result.partitions] == [micro_batch or 10]
    assert_same_weights(loaded(build, result.weights_file), train_by_backprop(build, data, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_pnn_of_one_partition_is_same_as_backprop(kind: str, tmp_path: Path) -> None:
    build, data = KINDS[kind]
    whole = fit(build, data, tmp_path / "backprop", method="backprop", epochs=2, batch_size=12)
    one = fit(build, data, tmp_path / "pnn", method="pnn", partitions=1, epochs=2, batch_size=12)
    assert_same_weights(loaded(build, one.weights_file), loaded(build, whole.weights_file))
    assert (one.train_loss, one.val_loss) == (whole.train_loss, whole.val_loss)


@pytest.mark.parametrize(("kind", "cuts", "starts"), [("mlp", "1,2", [2, 4]), ("conv", "1,3", [4, 12])])
def test_pnn_is_same_as_a_plain_loop_for_each_partition(kind: str, cuts: str, starts: list[int], tmp_path: Path) -> None:
    build, data = KINDS[kind]
    options: dict[str, Any] = {
        "epochs": (2, 1, 3), "lr": (0.01, 0.02, 0.005), "batch_size": (12, 9, 18), "kappa": (2.0, 5.0), "optimizer": "adam", "seed": 1,
    }  # fmt: skip
    result = fit(build, data, tmp_path / "run", cuts=cuts, **options)
    assert [(part["epochs"], part["batch"]) for part in result.partitions] == [(2, 12), (1, 9), (3, 18)]
    assert_same_weights(loaded(build, result.weights_file), train_by_pnn(build, starts, data, **options))  # type: ignore[arg-type]


def test_a_partition_is_left_alone_while_later_ones_train(tmp_path: Path) -> None:
    data = images()
    short = fit(small_conv, data, tmp_path / "short", cuts="1,2", epochs=(2, 2, 1), batch_size=12)
    long = fit(small_conv, data, tmp_path / "long", cuts="1,2", epochs=(2, 2, 4), batch_size=12)
    one, other = (loaded(small_conv, run.weights_file).state_dict() for run in (short, long))
    # Modules 0 to 8 are the first two partitions; their buffers count as well.
    same = {name: torch.equal(one[name], other[name]) for name in one}
    assert {name for name, equal in same.items() if not equal} == {name for name in one if int(name.split(".")[0]) >= 9}


def test_the_seed_decides_all_that_is_random(tmp_path: Path) -> None:
    runs = [
        fit(small_conv, images(), tmp_path / str(number), cuts="2", epochs=1, batch_size=12, seed=seed)
        for number, seed in enumerate((5, 5, 6))
    ]
    first, again, other = (loaded(small_conv, run.weights_file).state_dict() for run in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["12.weight"], other["12.weight"])


class _Tied(nn.Module):
    """A weight used twice, a frozen parameter, a buffer that nothing reads, and one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)])
        self.layers[1].weight = self.layers[0].weight
        self.layers[2].bias.requires_grad_(False)
        self.register_buffer("note", torch.arange(3.0))
        self.register_buffer("scale", torch.full((12,), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x).relu() * self.scale
        return self.layers[2](self.layers[1](x).relu())


@pytest.mark.parametrize("method", ["pnn", "backprop"])
def test_ties_frozen_parameters_and_unused_buffers_come_through(method: str, tmp_path: Path) -> None:
    data = vectors()
    options = {"epochs": 2, "batch_size": 12, "val_fraction": 0.0}
    result = lowmem_pnn.fit(
        _Tied, data, max_gpu_mem="400MB", device="cpu", workdir=tmp_path / "run", test=data, method=method, **options
    )
    model = loaded(_Tied, result.weights_file)
    start = plainloops.built(_Tied)
    assert model.layers[0].weight is model.layers[1].weight
    assert not torch.equal(model.layers[0].weight, start.layers[0].weight)
    assert torch.equal(model.layers[2].bias, start.layers[2].bias)
    assert torch.equal(model.note, start.note)
    if method == "backprop":
        assert_same_weights(model, train_by_backprop(_Tied, data, **options))
    x, y = data
    scores = model(x).detach()
    assert result.test_accuracy == pytest.approx(float((scores.argmax(1) == y).float().mean()))
    assert result.test_loss == pytest.approx(float(nn.functional.cross_entropy(scores, y)), rel=1e-5)


def test_a_model_that_is_given_is_trained_from_its_own_values_and_left_as_it_was(tmp_path: Path) -> None:
    model = plainloops.built(small_conv, seed=17)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"epochs": 1, "batch_size": 12}
    result = fit(model, images(), tmp_path / "run", method="backprop", **options)  # type: ignore[arg-type]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name

    def same_start() -> nn.Module:
        twin = small_conv()
        twin.load_state_dict(before)
        return twin

    assert_same_weights(loaded(small_conv, result.weights_file), train_by_backprop(same_start, images(), **options))


class _Forgets(nn.Module):
    """Uses one of its layers only in eval mode, by a branch inside a block that is not opened."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(12, 12)
            self.forgotten = nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                extra = self.forgotten(x)
            return self.used(x) + extra

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), nn.Linear(12, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


def test_a_parameter_without_gradient_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        CaptureError, match=r"parameter 'blocks\.0\.forgotten\.weight' got no gradient in partition 1 of 1 .*freeze it"
    ):
        fit(_Forgets, vectors(), tmp_path / "run", method="backprop", epochs=1)


def test_batches_too_small_for_the_model_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch"):
        fit(small_conv, images(), tmp_path / "run", method="backprop", epochs=1, batch_size=1)
    with pytest.raises(ConfigError, match="samples"):
        fit(small_conv, images(1), tmp_path / "other", method="backprop", epochs=1, batch_size=8)
