"""Runs with quantized optimizer state: the same wherever the model is cut, stopped and resumed; memory; refusals."""

import builtins
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem_pnn
from helpers import plainloops
from helpers.exact_runs import COMMON
from helpers.plainloops import assert_same_weights, loaded, train_by_backprop, train_by_exact
from helpers.quantized_state import zeros
from helpers.small_networks import Data, vectors
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.optim import low_precision
from lowmem_pnn.optim.low_precision import BLOCK_SIZE
from lowmem_pnn.optim.optimizers import OptimizerSpec
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.process import Process
from lowmem_pnn.training import start


def mlp() -> nn.Module:
    """Of three weights one is in one piece and one in two, both with a last block that is not whole; one stays float32."""
    return nn.Sequential(nn.Linear(12, 400), nn.ReLU(), nn.Linear(400, 300), nn.ReLU(), nn.Dropout(0.1), nn.Linear(300, 4))


@pytest.fixture
def plain_quantized_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain loops step the whole model by one optimizer of the configuration's specification."""
    names = [name for name, _ in mlp().named_parameters()]

    def make(config: Any, partition: int, learning: list[nn.Parameter]) -> torch.optim.Optimizer:
        spec = OptimizerSpec(
            config.optimizer[0], config.lr[0], weight_decay=config.weight_decay, fused=config.fused, state=config.optimizer_state,
            seed=config.seed,
        )  # fmt: skip
        named = dict(zip(names, learning, strict=True))
        return spec.build(named, zeros(spec, named))

    monkeypatch.setattr(plainloops, "make_optimizer", make)


def fit(folder: Path, data: Data | None = None, **options: Any) -> Result:
    options = {"method": "exact", "max_gpu_mem": "400MB", "device": "cpu", **options}
    return lowmem_pnn.fit(mlp, data or vectors(), workdir=folder, **options)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("int8", {"partitions": 1}),
        ("bf16", {"cuts": "1"}),
        ("bf16", {"cuts": "1,2", "micro_batch": 4}),
        ("int8", {"cuts": "1,2", "micro_batch": 4}),
        ("bf16", {"cuts": "1,2", "clip_norm": 0.5, "optimizer": "adam"}),
        ("int8", {"cuts": "1,2", "clip_norm": 0.5, "optimizer": "adam"}),
        pytest.param("int8", {"cuts": "1,2", "micro_batch": 4}, marks=pytest.mark.resident),
        pytest.param("bf16", {"cuts": "1,2", "clip_norm": 0.5}, marks=pytest.mark.resident),
    ],
    ids=[
        *("whole-int8", "two-bf16", "accumulated-bf16", "accumulated-int8", "clipped-bf16", "clipped-int8"),
        *("accumulated-int8-resident", "clipped-bf16-resident"),
    ],
)
@pytest.mark.usefixtures("plain_quantized_state")
def test_exact_with_quantized_state_is_same_as_one_optimizer_over_the_whole_model(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    options = {**COMMON, **options, "optimizer_state": kind}
    result = fit(tmp_path / "run", **options)
    expected = train_by_exact(mlp, vectors(), **options)
    assert_same_weights(loaded(mlp, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss
    unquantized = train_by_exact(mlp, vectors(), **{**options, "optimizer_state": "fp32"})
    assert not torch.equal(unquantized.model.state_dict()["2.weight"], expected.model.state_dict()["2.weight"])


@pytest.mark.parametrize("kind", ["bf16", "int8"])
@pytest.mark.usefixtures("plain_quantized_state")
def test_a_resident_partition_with_quantized_state_is_same_as_one_optimizer_over_the_whole_model(
    kind: str, tmp_path: Path
) -> None:
    options = {**COMMON, "micro_batch": 5, "optimizer_state": kind}
    result = fit(tmp_path / "run", method="backprop", **options)
    assert_same_weights(loaded(mlp, result.weights_file), train_by_backprop(mlp, vectors(), **options))


@pytest.mark.parametrize(
    ("kind", "method", "stops"),
    [("bf16", "exact", (3, 7)), ("int8", "exact", (7,)), ("bf16", "pnn", (7,)), ("int8", "backprop", (3,))],
)
def test_a_run_with_quantized_state_that_was_stopped_and_resumed_is_same_as_uninterrupted(
    kind: str, method: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "max_gpu_mem": "400MB", "device": "cpu", "model": "mlp:64-100-100-10", "data": "digits", "train_limit": 60, "test_limit": 50,
        "method": method, "epochs": 3, "batch_size": 16, "lr": 0.01, "optimizer_state": kind,
    }  # fmt: skip
    if method != "backprop":
        options["cuts"] = "1,2"
    whole = start.begin(configure(**options), tmp_path / "whole")
    for stop in stops:
        asked = itertools.count(1)
        process = Process(should_stop=lambda at=stop, asked=asked: next(asked) >= at)
        with pytest.raises(Stopped):
            start.begin(configure(**options), tmp_path / f"run{stop}", process=process)
        result = start.resume(tmp_path / f"run{stop}")
        assert result.resumed == 1
        assert Path(result.weights_file).read_bytes() == Path(whole.weights_file).read_bytes()


@pytest.mark.parametrize("method", ["backprop", "exact"])
def test_the_plan_foresees_less_and_the_peak_keeps_to_it(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_gpu_mem": "600MB", "device": "cpu", "epochs": 1, "batch_size": 64, "method": method}
    if method == "exact":
        options["cuts"] = "1,2"
    found = {}
    for kind in ("fp32", "bf16", "int8"):
        own = {**options, "optimizer_state": kind}
        plan = lowmem_pnn.plan("mlp:64-2048-2048-10", "digits", timing=False, **own)
        result = lowmem_pnn.fit("mlp:64-2048-2048-10", "digits", workdir=tmp_path / kind, train_limit=200, test_limit=100, **own)
        found[kind] = plan.predicted_peak_bytes, result.training_state_bytes, result.bytes_written
        assert result.oom_retries == 0
        assert result.peak_bytes <= result.predicted_peak_bytes
    params = 64 * 2048 + 2048**2 + 2048 * 10
    for kind, per_parameter in (("bf16", 4.0), ("int8", 6 - 8 / BLOCK_SIZE)):
        saved = per_parameter * params
        assert found["fp32"][1] - found[kind][1] == pytest.approx(saved, rel=1e-3)
        assert found["fp32"][2] - found[kind][2] >= 0.99 * saved  # headers
        temporaries = OptimizerSpec("adamw", state=kind).step_bytes(torch.empty(2048, 2048, device="meta"))  # type: ignore[arg-type]
        assert found["fp32"][0] - found[kind][0] >= 0.9 * (saved if method == "backprop" else 4 * 2048**2) - temporaries


def test_an_option_without_effect_is_refused(tmp_path: Path) -> None:
    for optimizer in ("sgd", "adam,sgd"):
        with pytest.raises(ConfigError, match=r"^--optimizer-state has no effect here: it needs --optimizer adam or adamw$"):
            configure(max_gpu_mem="1GB", optimizer=optimizer, optimizer_state="int8")
    with pytest.raises(ConfigError, match=r"^--optimizer-state 'int4' is none of fp32, bf16, int8; did you mean 'int8'\?$"):
        configure(max_gpu_mem="1GB", optimizer_state="int4")
    with pytest.raises(
        ConfigError, match=r"^--optimizer-state bf16 has no effect here: .* no float32 parameters of 4096 elements or more"
    ):
        lowmem_pnn.fit(
            "mlp:12-16-4", vectors(), max_gpu_mem="400MB", device="cpu", optimizer_state="bf16", workdir=tmp_path / "run"
        )


def test_a_missing_torchao_is_named_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imports = builtins.__import__

    def without(name: str, *args: Any, **more: Any) -> Any:
        if name.partition(".")[0] == "torchao":
            raise ModuleNotFoundError("No module named 'torchao'", name="torchao")
        return imports(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    low_precision._torchao.cache_clear()
    low_precision._int8_levels.cache_clear()
    for act in (functools.partial(lowmem_pnn.fit, workdir=tmp_path / "run"), lowmem_pnn.plan):
        with pytest.raises(ConfigError) as caught:
            act(mlp, vectors(), max_gpu_mem="400MB", device="cpu", optimizer_state="int8")  # type: ignore[operator]
        assert str(caught.value) == (
            "--optimizer-state int8 needs torchao, which cannot be imported (No module named 'torchao'); pip install "
            "'lowmem-pnn[torchao]', or give bf16"
        )
    assert not (tmp_path / "run").exists()
    fit(tmp_path / "other", **{**COMMON, "epochs": 1, "cuts": "1", "optimizer_state": "bf16"})
