"""Plans held against runs: bytes that are moved, methods side by side, plans for time."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem_pnn
from helpers.plainloops import stop_at
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.device import CpuDevice
from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.device.kernel_memory import CONVOLUTION_PRIMITIVE_BYTES
from lowmem_pnn.errors import BudgetError, ConfigError, Stopped
from lowmem_pnn.memory.heap import trim_threshold
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.planning.footprint import Footprint
from lowmem_pnn.planning.heap_share import HeapShare
from lowmem_pnn.planning.make_plan import make_plan
from lowmem_pnn.planning.request import PlanRequest
from lowmem_pnn.preview.preview import preview
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.reporting.plan_report import PlanReport
from lowmem_pnn.run.process import Process
from lowmem_pnn.training import start
from lowmem_pnn.workload import make_workload, profile_workload
from lowmem_pnn.workload.inputs import named_inputs, python_inputs


def config(**options: Any) -> FitConfig:
    given = {
        "model": "mlp:64-256-256-256-10",
        "data": "digits",
        "train_limit": 512,
        "epochs": 3,
        "cuts": (1, 2, 3),
        "val_fraction": 0,
    }
    return configure(**{"max_gpu_mem": "100MB", "device": "cpu", **given, **options})


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"optimizer": "sgd"}, {"micro_batch": 16}], ids=str)
def test_what_exact_moves_is_what_a_run_reports(options: dict[str, Any], tmp_path: Path) -> None:
    asked = config(method="exact", log_every=10**6, commit_every=10**6, **options)
    plan = preview(asked)
    (found,) = [one for one in plan.prospects if one.asked]
    assert plan.written_bytes == pytest.approx(3 * found.bytes_written_per_epoch, rel=0.05)
    start.begin(asked, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ends = [line for line in lines if "samples_per_second" in line]
    moved = {name: ends[2][name] - ends[1][name] for name in ("bytes_read", "bytes_written")}
    assert found.bytes_written_per_epoch == pytest.approx(moved["bytes_written"], rel=0.05)
    assert found.bytes_read_per_epoch == pytest.approx(moved["bytes_read"], rel=0.05)


def test_all_methods_are_forecast_side_by_side() -> None:
    prospects = {one.method: one for one in preview(config(method="pnn", kappa=1.0)).prospects}
    assert list(prospects) == ["pnn", "neuroflux", "incubate", "exact", "backprop"]
    assert [name for name, one in prospects.items() if one.asked] == ["pnn"]
    assert all(one.fits and one.seconds_per_epoch > 0 and one.measured_share == 1 for one in prospects.values())
    assert {name: one.partitions for name, one in prospects.items()} == {
        "pnn": 4, "neuroflux": 4, "incubate": 4, "exact": 4, "backprop": 1,
    }  # fmt: skip
    # Three epochs, and each partition's weights moved once.
    assert prospects["pnn"].seconds == pytest.approx(3 * prospects["pnn"].seconds_per_epoch)


def test_a_method_that_cannot_says_why() -> None:
    prospects = {one.method: one for one in preview(config(batch_size="auto", cuts=None)).prospects}
    assert "--batch-size auto" in prospects["exact"].reason
    assert not prospects["exact"].fits
    tight = preview(config(method="exact", cuts=None, model="mlp:64-1024-1024-1024-10", max_gpu_mem="42MB"))
    whole_model = next(one for one in tight.prospects if one.method == "backprop")
    assert whole_model.enough_bytes is not None
    assert whole_model.enough_bytes > 42_000_000
    assert "smallest budget" in str(tight)
    assert tight.advice.startswith("take --method ")


def planned(seconds_of: Any, **options: Any) -> Plan:
    given = {"method": "exact", "cuts": None, "plan_for": "time", "model": "mlp:64-512-512-512-512-10", "max_gpu_mem": "24MB"}
    asked = config(**{**given, **options})
    with CpuDevice(asked.max_gpu_mem) as device:
        workload = make_workload(asked, *named_inputs(asked), device.torch_device)
        return make_plan(PlanRequest(workload, profile_workload(workload, device), device), seconds_of)


def test_the_plan_of_least_predicted_time_is_taken() -> None:
    asked: list[Plan] = []

    def seconds_of(plan: Plan) -> float:
        asked.append(plan)
        return 1.0

    fewest = planned(seconds_of)
    assert len(asked) > 1, "several candidates"
    assert len(fewest.partitions) == min(len(plan.partitions) for plan in asked), "of equal ones the fewest partitions"
    # Whatever takes least time is taken, as far as it fits.
    most = planned(lambda plan: -len(plan.partitions))
    assert len(most.partitions) == max(len(plan.partitions) for plan in asked)
    assert all(part.predicted_peak_bytes <= 24_000_000 for plan in asked for part in plan.partitions)
    assert fewest in asked


def of_convolutions(norm: bool, **options: Any) -> PlanReport:
    """The plan of a network whose activations outweigh its weights."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for number in range(6):
            layers += [nn.Conv2d(32 if number else 3, 32, 3, padding=1), *([nn.BatchNorm2d(32)] if norm else []), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 256, 5))

    data = torch.rand(128, 3, 16, 16), torch.arange(128) % 5
    given = {"max_gpu_mem": "28MB", "timing": False, "device": "cpu", "batch_size": 64, **options}
    return lowmem_pnn.plan(build, data, **given)


def test_exact_recomputes_less_with_smaller_micro_batches() -> None:
    by_size, by_default = (of_convolutions(False, method="exact", plan_for=wish) for wish in ("size", "auto"))
    (only,) = by_default.partitions
    assert len(by_size.partitions) == 2
    assert only["micro_batch"] < by_size.partitions[0]["micro_batch"]
    assert of_convolutions(False, method="exact").partitions == by_default.partitions, "the default, and always the same"
    assert by_default.predicted_peak_bytes <= 28_000_000


def test_a_budget_that_no_plan_fits_says_what_would_do() -> None:
    reports = [of_convolutions(False, method="exact", max_gpu_mem="8MB", plan_for=wish) for wish in ("size", "auto")]
    assert not any(report.fits for report in reports)
    assert reports[0].reason == reports[1].reason
    assert "give --max-gpu-mem" in reports[0].reason


@pytest.mark.parametrize(
    "options",
    [
        {"norm": True, "method": "exact"},
        {"norm": False, "method": "pnn"},
        {"norm": False, "method": "exact", "lr": (1e-3, 1e-4)},
        {"norm": False, "method": "exact", "optimizer": ("sgd", "adam")},
        {"norm": False, "method": "exact", "recovery_epochs": 1},
        {"norm": False, "method": "exact", "partitions": 3},
    ],
    ids=str,
)
def test_where_a_plan_changes_what_is_learnt_its_size_decides(options: dict[str, Any]) -> None:
    assert of_convolutions(**options).partitions == of_convolutions(**options, plan_for="size").partitions


def test_streams_are_longer_where_the_plan_leaves_room() -> None:
    tight, roomy = (planned(lambda plan: 0.0, max_gpu_mem=budget, plan_for="size") for budget in ("26MB", "100MB"))
    for found, budget in ((tight, 26_000_000), (roomy, 100_000_000)):
        window = BufferSizes.of_budget(budget).stream_bytes
        assert window <= found.stream_bytes <= 4 * window
        assert all(part.predicted_peak_bytes <= budget for part in found.partitions)
    # No longer than what is moved: weights and AdamW's two moments, and its counts.
    parameters = sum(part.num_params for part in roomy.partitions)
    assert BufferSizes.of_budget(100_000_000).stream_bytes < roomy.stream_bytes == pytest.approx(3 * 4 * parameters, rel=0.001)
    assert Plan.from_json(roomy.to_json()) == roomy


def test_what_may_wait_to_be_written_is_kept_free_and_not_predicted() -> None:
    asked = config(method="exact", cuts=None, model="mlp:64-512-512-512-512-10", max_gpu_mem="30MB", plan_for="size")
    with CpuDevice(asked.max_gpu_mem) as device:
        workload = make_workload(asked, *named_inputs(asked), device.torch_device)
        request = PlanRequest(workload, profile_workload(workload, device), device)
        plan, footprint = make_plan(request), Footprint.of(request)
        assert plan.waiting_bytes == footprint.waiting_bytes(plan.stream_bytes) > 0
        assert plan.predicted_peak_bytes + plan.waiting_bytes + device.reserve_bytes <= 30_000_000
        # Large tensors are no part of the heap: what it keeps beside them is less than beside small ones.
        small, all_slack = footprint.constant_bytes_beside(0), footprint.constant_bytes
        assert small == all_slack - 3 * trim_threshold(30_000_000)
        part = plan.partitions[0]
        assert HeapShare(footprint).bytes_of(part, 0) < sum(
            layer.weight_bytes for layer in request.costs.layers[part.start : part.stop]
        )


def test_kernels_are_counted_for_each_number_of_samples() -> None:
    def of(samples: int, **options: Any) -> tuple[int, MemoryProfile]:
        asked = configure(
            max_gpu_mem="60MB", model="python:m", data="python:d", batch_size=8, device="cpu", **{"val_fraction": 0.0, **options}
        )
        data = torch.rand(samples, 3, 8, 8), torch.arange(samples) % 2
        build = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))  # noqa: E731
        with CpuDevice(asked.max_gpu_mem) as device:
            workload = make_workload(asked, *python_inputs(build, data, None, None)(asked), device.torch_device)
            request = PlanRequest(workload, profile_workload(workload, device), device)
            return Footprint.of(request).constant_bytes, request.profile

    constant, profile = of(16, method="exact")
    assert (profile.kernel_bytes, profile.emit_kernel_bytes) == tuple(number * CONVOLUTION_PRIMITIVE_BYTES for number in (6, 2))
    assert of(20, method="exact")[0] - constant == profile.kernel_bytes
    assert of(20, method="exact", val_fraction=0.2)[0] - constant == profile.emit_kernel_bytes
    assert of(16, method="pnn")[0] - constant == profile.emit_kernel_bytes


@pytest.mark.parametrize("given", [{"method": "pnn", "recovery_epochs": 1, "partitions": 2}, {"method": "exact"}], ids=str)
def test_the_budget_for_whole_batches_is_one_in_which_they_are(given: dict[str, Any]) -> None:
    def report(**options: Any) -> PlanReport:
        return of_convolutions(True, **given, **options)

    note = next(note for note in report().notes if "whole batch" in note)
    named = re.search(r"they see the whole batch from --max-gpu-mem (\d+)\.0MB on", note)
    assert named is not None, note
    assert report(max_gpu_mem=f"{named[1]}MB", batch_norm="refuse").fits
    assert not report(max_gpu_mem=f"{int(named[1]) * 95 // 100}MB", batch_norm="refuse").fits


def test_a_run_that_is_planned_for_time_ends_and_keeps_its_plan(tmp_path: Path) -> None:
    asked = config(method="exact", cuts=None, plan_for="time", epochs=2, model="mlp:64-512-512-512-512-10", max_gpu_mem="32MB")
    with pytest.raises(Stopped):
        start.begin(asked, tmp_path / "run", process=Process(should_stop=stop_at(2)))
    before = json.loads((tmp_path / "run" / "journal.json").read_text())["body"]["plan"]
    result = start.resume(tmp_path / "run")
    assert result is not None
    assert result.peak_bytes <= 32_000_000
    assert [part["stop"] for part in result.partitions] == [part["stop"] for part in before["partitions"]]


def test_a_plan_for_time_that_does_not_fit_names_a_budget_that_does() -> None:
    wishes = {"method": "pnn", "recovery_epochs": 1, "model": "mlp:64-1024-1024-1024-10"}
    with pytest.raises(BudgetError) as refused:
        planned(lambda plan: 0.0, **wishes, max_gpu_mem="24MB")
    enough = refused.value.enough_bytes
    assert enough is not None, str(refused.value)
    assert f"--max-gpu-mem {enough // 10**6}MB" in str(refused.value)
    assert planned(lambda plan: 0.0, **wishes, max_gpu_mem=enough)
    with pytest.raises(BudgetError, match="--batch-size 1000000 is larger than the 512 training samples: give at most 512"):
        planned(lambda plan: 0.0, max_gpu_mem="30MB", batch_size=1_000_000)


def test_plans_for_time_need_something_to_choose() -> None:
    for options, text in (
        ({"cuts": (1,)}, "needs cuts that are left"),
        ({"batch_size": "auto", "method": "pnn"}, "--batch-size auto"),
        ({"parallel_sil": True, "method": "pnn"}, "a plan of their own"),
    ):
        with pytest.raises(ConfigError, match=text):
            config(**{"cuts": None, "method": "exact", "plan_for": "time", **options})


def test_a_batch_that_is_larger_than_the_data_is_said_where_nothing_fits() -> None:
    report = preview(config(method="pnn", cuts=None, max_gpu_mem="30MB", batch_size=1_000_000), timing=False)
    assert report.reason.endswith("--batch-size 1000000 is larger than the 512 training samples: give at most 512")
