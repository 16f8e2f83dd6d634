"""Runs in which a part of the model is frozen: the same as in plain PyTorch, by every method that can."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem_pnn
from helpers.displays import StopsAt
from helpers.exact_runs import COMMON, fit
from helpers.frozen import FrozenByItsCode, frozen
from helpers.plainloops import assert_same_weights, built, loaded, train_by_backprop, train_by_exact
from helpers.small_networks import images, small_conv, small_resnet, vectors
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.training import initial_weights

CUT: dict[str, Any] = {**COMMON, "micro_batch": 5}


class Learns(FrozenByItsCode):
    """The same network, of which all learns."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.requires_grad_(True)


@pytest.mark.parametrize(
    ("pattern", "cuts"),
    [
        ("[0134].*", None),
        ("[0134].*", "1,2,3"),
        ("[37].*", "1"),
        ("[37].*", "1,2,3"),
        ("[34678]*", "1"),
        pytest.param("[34678]*", "1,2,3", marks=pytest.mark.resident, id="[34678]*-1,2,3-resident"),
        pytest.param("10.*", None, marks=pytest.mark.resident, id="10.*-None-resident"),
        ("10.*", "1,2,3"),
    ],
)
def test_exact_with_frozen_parameters_is_same_as_plain_pytorch(pattern: str, cuts: str | None, tmp_path: Path) -> None:
    options = {**CUT, **({"cuts": cuts} if cuts else {})}
    result = fit(Learns, images(), tmp_path / "run", freeze=pattern, **options)
    expected = train_by_exact(frozen(Learns, pattern), images(), **CUT)
    assert_same_weights(loaded(Learns, result.weights_file), expected.model)


@pytest.mark.parametrize("cuts", ["1", "1,2,3"])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.05}, {"optimizer": "sgd", "commit_every": 0}])
def test_what_the_models_code_freezes_has_moving_statistics(options: dict[str, Any], cuts: str, tmp_path: Path) -> None:
    build = lambda: FrozenByItsCode(0.3)  # noqa: E731
    result = fit(build, images(), tmp_path / "run", cuts=cuts, **{**CUT, **options})
    expected = train_by_exact(build, images(), **{**CUT, **options})
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    before = built(build, CUT["seed"])
    assert not torch.equal(before[1].running_mean, expected.model[1].running_mean)
    assert any(
        "the statistics of 2 frozen BatchNorms go on moving, unless --freeze-norm is given" in note for note in result.notes
    )


def test_norms_alone_may_be_frozen(tmp_path: Path) -> None:
    result = fit(small_resnet, images(), tmp_path / "run", freeze_norm=True, cuts="1", **CUT)

    def plain() -> nn.Module:
        model = small_resnet()
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                model = frozen(lambda model=model: model, f"{name}.*")()  # type: ignore[misc]
        return model

    expected = train_by_exact(plain, images(), **CUT)
    assert_same_weights(loaded(small_resnet, result.weights_file), expected.model)


def test_backprop_with_frozen_parameters_is_same_as_plain_pytorch(tmp_path: Path) -> None:
    result = fit(small_conv, images(), tmp_path / "run", method="backprop", train_only="*bias", **COMMON)
    names = [name for name, _ in small_conv().named_parameters() if not name.endswith("bias")]

    def plain() -> nn.Module:
        model = small_conv()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name not in names)
        return model

    assert_same_weights(loaded(small_conv, result.weights_file), train_by_backprop(plain, images(), **COMMON))


@pytest.mark.parametrize("method", ["pnn", "neuroflux"])
def test_frozen_parameters_of_the_other_methods_stay(method: str, tmp_path: Path) -> None:
    result = fit(Learns, images(), tmp_path / "run", method=method, cuts="1,2", freeze="[01].*", **CUT)
    before, after = built(Learns, CUT["seed"]).state_dict(), loaded(Learns, result.weights_file).state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert not moved & {name for name in before if name[:2] in ("0.", "1.")}
    assert {"3.weight", "4.running_mean", "10.weight"} <= moved


def test_what_is_frozen_is_said_and_has_no_state(tmp_path: Path) -> None:
    result = fit(Learns, images(), tmp_path / "run", freeze="[0134].*", cuts="1,2", keep_commits=2, commit_every=0, **CUT)
    assert result.notes[0] == "frozen: 8 of 14 parameters (276 of 500 values); 2 BatchNorms in eval mode"
    whole = lowmem_pnn.plan(Learns, images(), method="exact", cuts="1,2", max_gpu_mem="100MB", device="cpu", timing=False)
    frozen_plan = lowmem_pnn.plan(
        Learns, images(), method="exact", cuts="1,2", freeze="[0134].*", max_gpu_mem="100MB", device="cpu", timing=False
    )
    assert frozen_plan.training_state_bytes == whole.training_state_bytes - 3 * 4 * 276
    journal = json.loads((tmp_path / "run" / "journal.json").read_text())
    files = [part["file"] for part in journal["body"]["weights"]["partitions"]]
    # Frozen partitions are written once.
    assert files[:2] == ["p000.g000000.safetensors", "p001.g000000.safetensors"]
    assert files[2] != "p002.g000000.safetensors"


def test_frozen_weights_are_written_once_and_commits_write_what_learns(tmp_path: Path) -> None:
    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 2000), nn.ReLU(), nn.Linear(2000, 4))

    options = {**COMMON, "cuts": "1", "val_fraction": 0, "test_fraction": 0.1, "epochs": 1, "commit_every": 0, "freeze": "0.*"}
    few, many = (fit(wide, vectors(), tmp_path / str(limit), train_limit=limit, **options) for limit in (10, 30))
    frozen_bytes, learning_bytes, boundary_bytes = 4 * 13 * 2000, 12 * 8004, 10 * 4 * 2000
    assert few.bytes_written > 2 * frozen_bytes  # before training, and in the result
    # Two more steps, and as many commits.
    assert many.bytes_written - few.bytes_written < 2 * (learning_bytes + 2 * boundary_bytes) + 20_000 < 2 * 12 * 34_004
    store = json.loads((tmp_path / "30" / "journal.json").read_text())["body"]["weights"]
    assert store["rest"]["file"] == "rest.g0.safetensors"
    assert store["rest"]["bytes"] > frozen_bytes


@pytest.mark.parametrize("method", ["exact", "pnn"])
def test_runs_that_kept_frozen_weights_with_their_partitions_go_on(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**CUT, "method": method, "freeze": "[017].*", "cuts": "1,2", "commit_every": 0}
    whole = fit(Learns, images(), tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        patched.setattr(initial_weights, "constant_names", lambda chain, layers: set())
        with pytest.raises(Stopped):
            fit(Learns, images(), tmp_path / "run", display=StopsAt(2), **options)
    assert json.loads((tmp_path / "run" / "journal.json").read_text())["body"]["weights"]["rest"] is None
    result = fit(Learns, images(), tmp_path / "run", resume=True, **options)
    assert_same_weights(loaded(Learns, result.weights_file), loaded(Learns, whole.weights_file))


# Outputs of frozen partitions that are written once.


def test_outputs_of_frozen_partitions_are_computed_once(tmp_path: Path) -> None:
    options = {**CUT, "freeze": "[0134].*", "epochs": 3}
    cached = fit(Learns, images(), tmp_path / "cached", **options)
    assert any(
        note.startswith("partition 1 is frozen: its outputs are written once, and read in every epoch") for note in cached.notes
    )
    assert len(cached.partitions) == 2
    computed = fit(Learns, images(), tmp_path / "computed", cache_frozen=False, **options)
    assert len(computed.partitions) == 1
    assert_same_weights(loaded(Learns, cached.weights_file), loaded(Learns, computed.weights_file))
    assert cached.train_loss == computed.train_loss
    assert not list((tmp_path / "cached" / "activations").glob("*"))
    # Forward through the first partition once for every sample, and not once in every epoch.
    again = fit(Learns, images(), tmp_path / "again", cache_frozen=False, cuts="1", **options)
    assert again.macs > cached.macs


@pytest.mark.parametrize("at", [2, 6, 9])
def test_a_run_with_outputs_written_once_is_resumed(at: int, tmp_path: Path) -> None:
    options = {**CUT, "freeze": "[0134].*", "cuts": "1,2", "commit_every": 0}
    with pytest.raises(Stopped):
        fit(Learns, images(), tmp_path / "run", display=StopsAt(at), **options)
    result = fit(Learns, images(), tmp_path / "run", resume=True, **options)
    expected = train_by_exact(frozen(Learns, "[0134].*"), images(), **CUT)
    assert_same_weights(loaded(Learns, result.weights_file), expected.model)


@pytest.mark.parametrize("change", [{"augment": "basic"}, {"epochs": 1}, {"cache_frozen": False}, {"freeze": "0.*"}])
def test_where_outputs_change_or_are_needed_once_they_are_not_written(change: dict[str, Any]) -> None:
    options: dict[str, Any] = {"method": "exact", "freeze": "[0134].*", "cuts": "1,2", "epochs": 2, **change}
    report = lowmem_pnn.plan(FrozenByItsCode, images(), max_gpu_mem="100MB", device="cpu", timing=False, **options)
    assert "written once" not in str(report)


def test_outputs_that_are_written_count_on_the_disk() -> None:
    options: dict[str, Any] = {"method": "exact", "freeze": "[0134].*", "cuts": "1,2", "max_gpu_mem": "100MB", "device": "cpu"}
    with_outputs = lowmem_pnn.plan(Learns, images(), timing=False, **options)
    without = lowmem_pnn.plan(Learns, images(), timing=False, cache_frozen=False, **options)
    # 36 samples of (4, 6, 6) and (4, 4, 4), two labels, and pages of headers.
    assert with_outputs.disk_bytes - without.disk_bytes >= 36 * (4 * (144 + 64) + 16)
    small = lowmem_pnn.plan(Learns, images(), timing=False, max_disk=without.disk_bytes, **options)
    assert small.exit_code == 5
    assert "give more, or --no-cache-frozen (" in small.reason


@pytest.mark.parametrize("options", [{"freeze_norm": True}, {"freeze": "[0134].*"}])
def test_frozen_first_layers_are_timed_without_a_backward(options: dict[str, Any]) -> None:
    report = lowmem_pnn.plan(FrozenByItsCode, images(), method="exact", epochs=2, max_gpu_mem="100MB", device="cpu", **options)
    assert [prospect.method for prospect in report.prospects] == ["pnn", "neuroflux", "incubate", "exact", "backprop"]
    assert report.fits


class Mixes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(0, keepdim=True)


def mixing_net() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), Mixes(), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_frozen_layers_that_mix_samples_are_not_written_once(tmp_path: Path) -> None:
    options = {**COMMON, "freeze": "0.*", "micro_batch": 10}
    with pytest.raises(ConfigError, match=r"mixes the samples of a batch, and is in frozen layers .*; give --no-cache-frozen$"):
        fit(mixing_net, vectors(), tmp_path / "run", **options)
    result = fit(mixing_net, vectors(), tmp_path / "run", overwrite=True, cache_frozen=False, **options)
    expected = train_by_exact(frozen(mixing_net, "0.*"), vectors(), **COMMON)
    assert_same_weights(loaded(mixing_net, result.weights_file), expected.model)


def test_cache_frozen_is_for_exact(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--cache-frozen has no effect here: it needs --method exact"):
        fit(small_conv, images(), tmp_path / "run", method="backprop", cache_frozen=False, **CUT)


def test_patterns_are_checked_before_a_run_begins(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--train-only 'fc' matches no parameter of the model"):
        fit(small_conv, images(), tmp_path / "run", train_only="fc", **CUT)
    assert not (tmp_path / "run").exists()
