"""Recovery: after `pnn` some partitions learn on through the others, as in a plain loop over a model that is frozen in part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem_pnn
from helpers.plainloops import (
    Trained,
    assert_same_weights,
    loaded,
    make_optimizer,
    recover_plainly,
    step_lines,
    train_by_exact,
    train_by_pnn,
    training_split,
)
from helpers.small_networks import Data, images, small_conv, small_mlp, vectors
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.reporting.run_status import RunStatus
from lowmem_pnn.seeds import permutation_of
from lowmem_pnn.sources.subsets import SubsetSplit

# Cuts by layer, and the modules that they stand before.
CUTS: dict[str, tuple[Callable[[], Any], Data, str, list[int]]] = {
    "mlp": (small_mlp, vectors(), "1,2", [2, 4]),
    "conv": (small_conv, images(), "1,2", [4, 9]),
}
# 36 samples for training, of 40, make a short last batch.
COMMON: dict[str, Any] = {
    "epochs": (2, 1, 2), "lr": (0.01, 0.02, 0.005), "batch_size": 10, "kappa": (2.0, 5.0), "optimizer": "adam", "seed": 1,
    "recovery_epochs": 2,
}  # fmt: skip


def fit(build: Callable[[], nn.Module], data: Data, folder: Path, **options: Any) -> Result:
    return lowmem_pnn.fit(build, data, max_gpu_mem="400MB", device="cpu", workdir=folder, **options)


def check_equal(kind: str, folder: Path, recovering: list[int], **options: Any) -> Trained:
    """A run has the weights, buffers and training loss of the plain loops, which are returned."""
    build, data, cuts, starts = CUTS[kind]
    options = {**COMMON, "cuts": cuts, **options}
    result = fit(build, data, folder, **options)
    assert result.oom_retries == 0
    expected = recover_plainly(train_by_pnn(build, starts, data, **options), starts, data, recovering, **options)  # type: ignore[arg-type]
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss
    return expected


@pytest.mark.parametrize(
    ("kind", "recover", "recovering"),
    [
        ("conv", (1,), [0]),
        ("conv", (2,), [1]),
        ("conv", (3,), [2]),
        ("conv", (1, 3), [0, 2]),
        ("mlp", (1, 3), [0, 2]),
        ("conv", None, [0, 1]),
        ("conv", "all", [0, 1, 2]),
    ],
    ids=["first", "middle", "last", "around", "around, vectors", "default", "all"],
)
def test_recovery_is_same_as_a_plain_loop_over_a_model_that_is_frozen_in_part(
    kind: str, recover: Any, recovering: list[int], tmp_path: Path
) -> None:
    given = {} if recover is None else {"recover": recover}
    check_equal(kind, tmp_path / "run", recovering, **given)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "momentum": 0.8, "weight_decay": 0.01, "micro_batch": 4},
        {"optimizer": "adamw", "weight_decay": 0.02, "fused": False, "lr_schedule": "onecycle"},
        {"clip_norm": 0.1, "label_smoothing": 0.1},
        {"lr_schedule": "cosine", "warmup_steps": 2, "micro_batch": 4},
    ],
    ids=["sgd", "adamw", "clipped", "cosine"],
)
def test_recovery_has_the_options_of_training(options: dict[str, Any], tmp_path: Path) -> None:
    check_equal("conv", tmp_path / "run", [0, 1], recover=(1, 2), **options)


def test_pnn_without_recovery_has_them_too(tmp_path: Path) -> None:
    build, data, cuts, starts = CUTS["conv"]
    options = {
        **COMMON, "recovery_epochs": 0, "clip_norm": 0.5, "lr_schedule": "cosine", "warmup_steps": 2, "label_smoothing": 0.1,
    }  # fmt: skip
    result = fit(build, data, tmp_path / "run", cuts=cuts, **options)
    expected = train_by_pnn(build, starts, data, **options)
    assert_same_weights(loaded(build, result.weights_file), expected)


def test_partitions_have_their_own_batches_before_the_recovery_which_has_those_of_the_last(tmp_path: Path) -> None:
    check_equal("conv", tmp_path / "run", [0, 1], batch_size=(18, 12, 9))


def test_a_partition_that_is_alone_learns_on(tmp_path: Path) -> None:
    options = {**COMMON, "epochs": 1, "lr": 0.01, "kappa": 2.0, "partitions": 1}
    before = fit(small_mlp, vectors(), tmp_path / "before", **{**options, "recovery_epochs": 0})
    after = fit(small_mlp, vectors(), tmp_path / "after", **options)
    assert after.train_loss < before.train_loss


def test_frozen_partitions_are_untouched_and_the_others_learn(tmp_path: Path) -> None:
    options = {**COMMON, "cuts": "1,2"}
    without, with_recovery = (
        loaded(small_conv, fit(small_conv, images(), tmp_path / str(epochs), **{**options, **given}).weights_file).state_dict()
        for epochs, given in ((0, {"recovery_epochs": 0}), (2, {"recover": (2,)}))
    )
    changed = {name for name in without if not torch.equal(without[name], with_recovery[name])}
    # Modules 4 to 8 are the second partition; the counts and the running statistics of its BatchNorm change as well.
    assert changed == {name for name in without if 4 <= int(name.split(".")[0]) <= 8}


def test_frozen_parameters_of_a_partition_that_recovers_stay(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = small_conv()
        assert isinstance(model, nn.Sequential)
        for number in (0, 5):
            model[number].requires_grad_(False)
        return model

    options = {**COMMON, "cuts": "1,2", "recover": (1, 2)}
    result = fit(build, images(), tmp_path / "run", **options)
    model = train_by_pnn(build, [4, 9], images(), **options)  # type: ignore[arg-type]
    expected = recover_plainly(model, [4, 9], images(), [0, 1], **options)  # type: ignore[arg-type]
    found = loaded(build, result.weights_file)
    assert_same_weights(found, expected.model)
    torch.manual_seed(1)
    assert torch.equal(found.state_dict()["0.weight"], small_conv().state_dict()["0.weight"])


@pytest.mark.parametrize("weights", ["move", pytest.param("stay", marks=pytest.mark.resident)])
def test_recovery_after_exact_training_starts_the_optimizer_anew(weights: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "method": "exact", "cuts": "1,2", "epochs": 2, "batch_size": 10, "lr": 0.01, "recovery_epochs": 1, "recover": (2,),
        "micro_batch": 4,
    }  # fmt: skip
    result = fit(small_conv, images(), tmp_path / "run", **options)
    trained = train_by_exact(small_conv, images(), **options)
    expected = recover_plainly(trained.model, [4, 9], images(), [1], **options)  # type: ignore[arg-type]
    assert_same_weights(loaded(small_conv, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


def test_a_first_batch_in_which_nothing_counts_leaves_the_optimizer_new(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "method": "exact", "epochs": 2, "batch_size": 10, "lr": 0.01, "recovery_epochs": 1, "recover": "all", "val_fraction": 0,
    }  # fmt: skip
    split, config = (
        training_split(vectors(), **options),
        configure(max_gpu_mem="1GB", model="python:m", data="python:d", **options),
    )
    assert isinstance(split, SubsetSplit)
    order, (x, y) = split.numbers[permutation_of(len(split), config.seed, "recovery", 0)], vectors()
    y[order[:10]] = -100
    result = fit(small_mlp, (x, y), tmp_path / "run", cuts="1,2", **options)
    model = train_by_exact(small_mlp, (x, y), **options).model
    optimizer = make_optimizer(config, 0, list(model.parameters()))
    for begin in range(10, len(order), 10):
        part = order[begin : begin + 10]
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_same_weights(loaded(small_mlp, result.weights_file), model)


def test_scores_are_those_of_the_recovered_model(tmp_path: Path) -> None:
    test = images(30, seed=1)
    result = fit(small_conv, images(), tmp_path / "run", cuts="1,2", recover=(1,), test=test, **COMMON)
    with torch.no_grad():
        scores = loaded(small_conv, result.weights_file)(test[0])
    assert result.test_loss == pytest.approx(float(nn.functional.cross_entropy(scores, test[1])), rel=1e-5)
    assert result.test_accuracy == pytest.approx(float((scores.argmax(1) == test[1]).float().mean()))


class _StopsInRecovery(Display):
    """Stops a run at the `at`th batch of its recovery, which comes after so many other batches."""

    def __init__(self, at: int) -> None:
        self._left = at

    def advance(self, status: Callable[[], RunStatus]) -> None:
        self._left -= 1
        if not self._left:
            raise Stopped("enough")


@pytest.mark.parametrize(("clip_norm", "stops"), [(None, (1, 6)), (0.1, (2,))])
def test_a_recovery_that_was_interrupted_and_resumed_is_same_as_uninterrupted(
    clip_norm: float | None, stops: tuple[int, ...], tmp_path: Path
) -> None:
    build, data, cuts, _ = CUTS["conv"]
    options = {**COMMON, "cuts": cuts, "clip_norm": clip_norm, "commit_every": 0.0, "log_every": 1}
    expected = fit(build, data, tmp_path / "whole", **options)
    assert step_lines(tmp_path / "whole")[-1]["lr"] == 0.02, "of the last partition that recovers"
    steps = [(line["visit"], line["step"]) for line in step_lines(tmp_path / "whole")]
    # An epoch of 36 samples has 4 batches: the partitions come to 8, 4 and 8 of them, the recovery to 8 more.
    assert len(steps) == 28
    for at in stops:
        folder = tmp_path / f"run{at}"
        with pytest.raises(Stopped):
            fit(build, data, folder, display=_StopsInRecovery(20 + at), **options)
        result = fit(build, data, folder, resume=True, **options)
        assert result.resumed == 1
        assert Path(result.weights_file).read_bytes() == Path(expected.weights_file).read_bytes()
        assert (result.train_loss, result.val_loss) == (expected.train_loss, expected.val_loss)
        assert [(line["visit"], line["step"]) for line in step_lines(folder)] == steps


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"recover": (1,)}, "--recover"),
        ({"recovery_epochs": 1, "recover": (4,)}, r"--recover 4\b.*3 partitions"),
        ({"recovery_epochs": 1, "recover": (0,)}, "--recover"),
        ({"recovery_epochs": 1, "recover": "none"}, "--recover"),
        ({"recovery_epochs": -1}, "--recovery-epochs"),
        ({"recovery_epochs": 1, "freeze": "[02].*"}, "all weights of partitions 1,2 are frozen; give --recover 3"),
    ],
)
def test_a_recovery_of_nothing_is_an_error(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        fit(small_mlp, vectors(), tmp_path / "run", cuts="1,2", epochs=1, **options)
    assert not (tmp_path / "run").exists()


class _Tied(nn.Sequential):
    """A network whose last layer has the first one's weight."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
        self[4].weight = self[0].weight


@pytest.mark.parametrize("options", [{}, {"recover": (3,)}])
def test_tied_weights_recover_with_all_that_use_them(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train '0.weight' by a part .* tied in partitions 1,3, .* give --recover 1,(2,)?3$"):
        fit(_Tied, vectors(), tmp_path / "run", method="exact", cuts="1,2", epochs=1, recovery_epochs=1, **options)
