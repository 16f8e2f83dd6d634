"""Runs that begin with pretrained weights: the same as in plain PyTorch, with the defaults of fine-tuning, through resumes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lowmem_pnn
from helpers.commands import lowmem_pnn as command
from helpers.displays import StopsAt
from helpers.exact_runs import COMMON, fit
from helpers.plainloops import assert_same_weights, loaded, train_by_exact
from helpers.small_networks import images, small_conv, small_mlp, vectors
from lowmem_pnn.errors import CheckpointError, ConfigError, Stopped

DATA = Path(os.environ.get("LOWMEM_PNN_DATA", "none"))


def pretrained(build: Callable[[], nn.Module], seed: int = 7) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = build()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            nn.init.uniform_(buffer, 0.5, 1.5)
    return model.state_dict()


def begun_with(build: Callable[[], nn.Module], state: dict[str, torch.Tensor]) -> Callable[[], nn.Module]:
    """What one writes in plain PyTorch."""

    def begin() -> nn.Module:
        model = build()
        model.load_state_dict(state, strict=False)
        return model

    return begin


@pytest.mark.parametrize("kind", ["safetensors", "pt", "state_dict"])
def test_exact_from_pretrained_weights_is_same_as_plain_pytorch(kind: str, tmp_path: Path) -> None:
    state = pretrained(small_conv)
    given: Any = state
    if kind == "safetensors":
        given = tmp_path / "w.safetensors"
        save_file(state, given)
    elif kind == "pt":
        given = tmp_path / "w.pt"
        torch.save({"state_dict": {"module." + name: value for name, value in state.items()}}, given)
    result = fit(small_conv, images(), tmp_path / "run", weights=given, cuts="1", **COMMON)
    expected = train_by_exact(begun_with(small_conv, state), images(), **COMMON)
    assert_same_weights(loaded(small_conv, result.weights_file), expected.model)
    assert result.train_loss == pytest.approx(expected.train_loss, abs=1e-6)
    assert result.weights["loaded"] == len(state)
    assert result.weights["new"] == []


def test_a_new_head_has_the_constructors_values(tmp_path: Path) -> None:
    *_, head = (name.rpartition(".")[0] for name in small_mlp().state_dict())
    state = pretrained(small_mlp)
    kept = {name: value for name, value in state.items() if not name.startswith(head)}
    wide = {**kept, f"{head}.weight": torch.zeros(9, state[f"{head}.weight"].shape[1]), f"{head}.bias": torch.zeros(9)}
    result = fit(small_mlp, vectors(), tmp_path / "run", weights=wide, **COMMON)
    expected = train_by_exact(begun_with(small_mlp, kept), vectors(), **COMMON)
    assert_same_weights(loaded(small_mlp, result.weights_file), expected.model)
    assert [name.partition(" ")[0] for name in result.weights["new"]] == [f"{head}.weight", f"{head}.bias"]
    assert f"new, with random values: {head}.weight (4, " in str(result)


def test_pretrained_weights_change_the_defaults(tmp_path: Path) -> None:
    state = pretrained(small_mlp)
    options: dict[str, Any] = {"max_gpu_mem": "100MB", "device": "cpu"}
    plan = lowmem_pnn.plan(small_mlp, vectors(), weights=state, timing=False, **options)
    assert "trained by exact, 3 epochs, adamw, lr 0.001" in str(plan)
    plan = lowmem_pnn.plan(small_mlp, vectors(), weights=state, method="backprop", epochs=1, timing=False, **options)
    assert "trained by backprop, 1 epoch, adamw, lr 0.001" in str(plan)
    plan = lowmem_pnn.plan(small_mlp, vectors(), weights="none", timing=False, **options)
    assert "method pnn" in str(plan)
    assert "pretrained" not in str(plan)


def test_a_folder_of_a_run_is_where_another_begins(tmp_path: Path) -> None:
    first = fit(small_mlp, vectors(), tmp_path / "first", **COMMON)
    second = fit(small_mlp, vectors(), tmp_path / "second", weights=tmp_path / "first", **COMMON)
    state = load_file(first.weights_file)
    expected = train_by_exact(begun_with(small_mlp, state), vectors(), **COMMON)
    assert_same_weights(loaded(small_mlp, second.weights_file), expected.model)


def test_a_resume_compares_the_weights_and_does_without_them(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    state = pretrained(small_mlp)
    save_file(state, file)
    options: dict[str, Any] = {**COMMON, "weights": file, "commit_every": 0}
    with pytest.raises(Stopped):
        fit(small_mlp, vectors(), tmp_path / "run", display=StopsAt(6), **options)
    save_file({name: value + 1 for name, value in state.items()}, file)
    with pytest.raises(
        CheckpointError, match=r"the weights .*w.safetensors are not what the run in .*run began with; bring them back"
    ):
        fit(small_mlp, vectors(), tmp_path / "run", resume=True, **options)
    file.unlink()
    result = fit(small_mlp, vectors(), tmp_path / "run", resume=True, **options)
    expected = train_by_exact(begun_with(small_mlp, state), vectors(), **COMMON)
    assert_same_weights(loaded(small_mlp, result.weights_file), expected.model)
    assert result.weights["source"] == str(file)


def test_other_weights_at_a_resume_are_refused(tmp_path: Path) -> None:
    fit(small_mlp, vectors(), tmp_path / "run", weights=pretrained(small_mlp), **COMMON)
    with pytest.raises(
        ConfigError, match=r"began with --weights python:OrderedDict, and --weights .*w.pt is given now; leave it out"
    ):
        fit(small_mlp, vectors(), tmp_path / "run", resume=True, weights=tmp_path / "w.pt", **COMMON)


def test_faults_of_weights_are_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing in the state_dict that was given is of model python:small_mlp"):
        fit(small_mlp, vectors(), tmp_path / "run", weights={"a": torch.zeros(1)}, **COMMON)
    assert not (tmp_path / "run").exists()
    line = f"fit --max-gpu-mem 100MB --device cpu --model mlp:64-10 --data digits --workdir {tmp_path / 'run'} --weights "
    for weights, code, text in (
        ("default", 3, "--weights default: model mlp:64-10 has no weights of its own"),
        (f"{tmp_path}/no.pt", 3, f"--weights: there is no file {tmp_path}/no.pt; give default, or a path"),
        ("''", 3, "--weights ''"),
    ):
        done = command(line + weights)
        assert done.code == code
        assert done.fault.startswith(text)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not (DATA / "mobilenet_v2-imagenet.safetensors").is_file(), reason="needs mobilenet_v2-imagenet.safetensors")
def test_mobilenet_is_planned_from_its_imagenet_weights() -> None:
    x, y = torch.zeros(8, 3, 32, 32), torch.arange(8) % 4
    plan = lowmem_pnn.plan(
        "mobilenet_v2",
        (x, y),
        weights=DATA / "mobilenet_v2-imagenet.safetensors",
        max_gpu_mem="200MB",
        device="cpu",
        timing=False,
    )
    assert "new, with random values: classifier.1.weight (4, 1280), classifier.1.bias (4,)" in str(plan)
