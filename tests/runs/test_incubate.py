"""Deep Incubation: the same bits as plain loops, at every commit and stop, within its plan; and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowmem_pnn
from helpers.incubated import thin_conv, thin_mlp, train_by_incubate
from helpers.plainloops import assert_same_weights, loaded, recover_plainly, stop_at, train_by_backprop
from helpers.small_networks import Data, Floats, images, small_conv, small_gpt, small_mlp, tokens, vectors
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import BudgetError, CaptureError, CheckpointError, ConfigError, Stopped
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.process import Process
from lowmem_pnn.training import start
from lowmem_pnn.workload.inputs import python_inputs

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], nn.Sequential], Data, str, list[int]]] = {
    "mlp": (small_mlp, thin_mlp, vectors(), "1", [2]),
    "conv": (small_conv, thin_conv, images(), "1,2", [4, 9]),
}
# 36 samples for training, of 40, make a short last batch.
COMMON: dict[str, Any] = {"epochs": (2,), "meta_epochs": 3, "lr": (0.01,), "batch_size": (10,), "optimizer": "adam", "seed": 1}


def fit(build: Callable[[], nn.Module], data: Data, folder: Path, **options: Any) -> Result:
    common = {"max_gpu_mem": "400MB", "device": "cpu", "method": "incubate", **COMMON}
    return lowmem_pnn.fit(build, data, workdir=folder, **{**common, **options})


# The same bits as plain PyTorch.


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mlp", {}),
        ("conv", {}),
        ("conv", {"micro_batch": 4, "label_smoothing": 0.1, "clip_norm": 0.5}),
        (
            "mlp",
            {
                "epochs": (1, 3),
                "lr": (0.02, 0.01),
                "optimizer": ("sgd", "adamw"),
                "batch_size": (8, 12),
                "shuffle": (False, True),
            },
        ),
    ],
    ids=["mlp", "conv", "accumulated", "by partition"],
)
def test_incubation_is_same_as_plain_loops(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    build, thin, data, cuts, starts = CASES[kind]
    result = fit(build, data, tmp_path / "run", cuts=cuts, **options)
    expected, _ = train_by_incubate(build, thin, starts, data, **{**COMMON, **options})
    assert_same_weights(loaded(build, result.weights_file), expected)
    assert not (tmp_path / "run" / "meta").exists()


def test_recovery_trains_all_partitions_of_the_assembled_model(tmp_path: Path) -> None:
    build, thin, data, cuts, starts = CASES["conv"]
    result = fit(build, data, tmp_path / "run", cuts=cuts, recovery_epochs=2)
    expected, _ = train_by_incubate(build, thin, starts, data, **COMMON)
    assert isinstance(expected, nn.Sequential)
    recover_plainly(expected, starts, data, [0, 1, 2], method="incubate", recovery_epochs=2, **COMMON)
    assert_same_weights(loaded(build, result.weights_file), expected)


def test_one_partition_is_same_as_backprop(tmp_path: Path) -> None:
    build, _, data, _, _ = CASES["mlp"]
    result = fit(build, data, tmp_path / "run")
    options = {name: value for name, value in COMMON.items() if name != "meta_epochs"}
    assert_same_weights(loaded(build, result.weights_file), train_by_backprop(build, data, **options))
    assert result.meta == {}


def test_the_result_counts_the_meta_model(tmp_path: Path) -> None:
    build, _, (x, y), cuts, _ = CASES["mlp"]
    val = vectors(20, seed=5)
    result = lowmem_pnn.fit(
        build,
        (x, y),
        val,
        test=val,
        max_gpu_mem="400MB",
        device="cpu",
        workdir=tmp_path / "run",
        cuts=cuts,
        method="incubate",
        **COMMON,
    )
    thin, whole = [12 * 20, 20 * 4], [12 * 20, 20 * 16 + 16 * 4]
    # Three epochs of the meta model; two of each partition, the first through the tail; the first boundary is written once.
    per_sample = 3 * sum(thin) + 2 * (sum(whole) + thin[1]) + thin[0]
    assert result.macs == 40 * per_sample
    assert result.meta["params"] == 12 * 20 + 20 + 20 * 4 + 4
    assert result.meta["epochs"] == 3
    assert 0 < result.meta["seconds"] < result.seconds
    assert result.meta["test_accuracy"] is not None
    # The assembled model is validated as a whole.
    assert result.val_accuracy == result.scores["val"]["accuracy"]


def test_augmented_views_are_written_by_thin_parts(tmp_path: Path) -> None:
    build, _, data, cuts, _ = CASES["conv"]
    results = [
        fit(build, data, tmp_path / f"run{views}", cuts=cuts, augment="basic", views=views, epochs=(4,)) for views in (1, 2)
    ]
    one, two = (loaded(build, result.weights_file).state_dict() for result in results)
    # The first partition sees augmented samples in any case; the second one as many views as there are.
    assert torch.equal(one["0.weight"], two["0.weight"])
    assert not torch.equal(one["4.weight"], two["4.weight"])


def test_tokens_go_through_a_copy_of_the_first_block(tmp_path: Path) -> None:
    data = tokens(24)
    result = fit(lambda: small_gpt(False, dropout=0.0), data, tmp_path / "run", partitions=2, recovery_epochs=1)
    assert result.meta["params"] > 0
    assert result.train_loss is not None
    assert result.train_loss < 2.5  # of 13 tokens at random: 2.56


def test_thin_parts_give_what_partitions_give_in_lower_precision(tmp_path: Path) -> None:
    # Float32 crosses the cuts of this model, whatever it computes in.
    data = vectors(40, 64)
    result = fit(lambda: Floats(4), data, tmp_path / "run", cuts="1,2", precision="bf16", epochs=(8,), meta_epochs=8)
    assert result.train_loss is not None
    assert result.train_loss < 1.3  # of four classes at random: 1.39


# Stops and resumes.


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[FitConfig, Any, Result]:
    """A run of meta model, partitions and recovery that is never stopped, and how to begin another one."""
    build, _, data, cuts, _ = CASES["conv"]
    options = {"method": "incubate", "cuts": cuts, "recovery_epochs": 2, "commit_every": 0, "device": "cpu", **COMMON}
    config = configure(max_gpu_mem="400MB", model="python:model", data="python:data", **options)
    open_inputs = python_inputs(build, data, None, None)
    whole = start.begin(config, tmp_path_factory.mktemp("whole") / "run", open_inputs)
    assert whole is not None
    return config, open_inputs, whole


@pytest.mark.parametrize("batch", [2, 14, 20, 32])
def test_stopped_anywhere_and_resumed_is_same_as_uninterrupted(
    batch: int, uninterrupted: tuple[FitConfig, Any, Result], tmp_path: Path
) -> None:
    config, open_inputs, whole = uninterrupted
    with pytest.raises(Stopped, match="goes on from the last commit") as stopped:
        start.begin(config, tmp_path / "run", open_inputs, process=Process(should_stop=stop_at(batch)))
    assert "meta" not in str(stopped.value)
    thin_parts = tmp_path / "run" / "meta" / "model.safetensors"
    if batch == 20:  # the meta model is trained
        kept = thin_parts.rename(tmp_path / "kept")
        with pytest.raises(CheckpointError, match=r"meta/model\.safetensors is missing"):
            start.resume(tmp_path / "run", open_inputs=open_inputs)
        kept.rename(thin_parts)
    resumed = start.resume(tmp_path / "run", open_inputs=open_inputs)
    assert resumed is not None
    assert Path(resumed.weights_file).read_bytes() == Path(whole.weights_file).read_bytes()
    assert (resumed.macs, resumed.train_loss) == (whole.macs, whole.train_loss)


# Plans.


def test_a_plan_counts_the_tail_and_its_error_names_a_budget_that_works(tmp_path: Path) -> None:
    build, _, data, cuts, _ = CASES["conv"]
    options: dict[str, Any] = {"cuts": cuts, "compare": False}
    report = lowmem_pnn.plan(build, data, max_gpu_mem="400MB", device="cpu", method="incubate", **options, **COMMON)
    assert any("meta model: 3 thin parts" in note for note in report.notes)
    with pytest.raises(BudgetError, match="--max-gpu-mem") as fault:
        fit(build, data, tmp_path / "small", **{**options, "max_gpu_mem": "2MB"})
    assert fault.value.enough_bytes is not None
    fit(build, data, tmp_path / "enough", **{**options, "max_gpu_mem": fault.value.enough_bytes})


# What it refuses.


class TwoTensors(nn.Module):
    """Two tensors cross its only cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        one = self.first(x).relu()
        scores: Tensor = self.last(one + self.second(x))
        return scores


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": "auto"}, "--batch-size auto: only partitions"),
        ({"eval_every": 2}, "--eval-every has no effect here"),
        (
            {"compile": True},
            "--method incubate trains a thin model of the whole from random weights, and --compile is for other methods",
        ),
        (
            {"freeze_norm": True},
            "--method incubate trains a thin model of the whole from random weights, and --freeze-norm is for other methods",
        ),
        ({"plan_for": "time"}, r"--plan-for has no effect here: .*\(plans of incubate are made for the memory"),
        ({"method": "pnn"}, "--meta-epochs has no effect here: it needs --method incubate"),
    ],
)
def test_options_of_other_methods_are_refused(options: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=error):
        fit(small_mlp, vectors(), tmp_path / "run", cuts="1", **options)


def test_cuts_that_several_tensors_cross_are_refused(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, CaptureError), match=r"needs samples and boundaries of one tensor each|--cuts|cut into"):
        fit(TwoTensors, vectors(), tmp_path / "run", partitions=3)


def test_the_log_tells_of_thin_parts_which_are_in_float32_whatever_the_weights_are(tmp_path: Path) -> None:
    build, _, data, cuts, _ = CASES["mlp"]
    result = fit(build, data, tmp_path / "run", cuts=cuts, weights_dtype="bf16")
    assert load_file(result.weights_file)["0.weight"].dtype == torch.bfloat16
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["action"] for line in lines} == {"learn", "emit"}
