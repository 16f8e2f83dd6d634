"""Forecasts: sums over a program against counting batch by batch; bytes against what small runs report."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem_pnn
from helpers.plainloops import stop_at
from lowmem_pnn.api import plan_run, resume_run, start_run
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.device import CpuDevice
from lowmem_pnn.device.buffers import BufferSizes
from lowmem_pnn.engine.passes import micro_batches
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.methods import Sweep, Visit, make_method
from lowmem_pnn.partition_plan import PartitionPlan, Plan
from lowmem_pnn.planning.forecast import PartitionBytes, Setting, Work, one_epoch, whole
from lowmem_pnn.planning.make_plan import make_plan
from lowmem_pnn.profiling.costs import Affine, LayerCost, MemoryProfile
from lowmem_pnn.profiling.nominal import MachineSpeed, nominal_timings
from lowmem_pnn.profiling.timings import LayerTimings, MachineTimings, Seconds
from lowmem_pnn.reporting.plan_report import PlanReport
from lowmem_pnn.units import seconds_text
from lowmem_pnn.workload import make_workload, profile_workload
from lowmem_pnn.workload.inputs import named_inputs

pytestmark = pytest.mark.usefixtures("imports_are_no_garbage")

SAMPLES = {"train": 50, "val": 7}
NOTHING = Seconds(0.0, 0.0)
# Four layers, two in each partition; powers of ten tell them apart in sums.
FORWARD = [Seconds(0.5, 10.0**layer) for layer in range(4)]


def plan(micro_batch: int = 5, batch: int = 16) -> Plan:
    parts = [
        PartitionPlan(
            start=start, stop=start + 2, micro_batch=micro_batch, batch=batch, predicted_peak_bytes=1, state_bytes=1, num_params=10,
            input_bytes_per_sample=4, output_bytes_per_sample=8, forward_macs=1,
        )
        for start in (0, 2)
    ]  # fmt: skip
    return Plan(tuple(parts), 1, 0, 1, smallest_micro_batch=2, sweep_micro_batch=micro_batch)


def rates(**changes: Any) -> MachineTimings:
    layers = tuple(LayerTimings(one, NOTHING, NOTHING, NOTHING) for one in FORWARD)
    return dataclasses.replace(
        MachineTimings(layers, step_per_parameter=0.0, read_per_byte=0.0, write_per_byte=0.0, memory_per_byte=0.0), **changes
    )


def setting(**changes: Any) -> Setting:
    partitions = [
        PartitionBytes(weights=48, buffers=8, trainable=40, optimizer=80, inputs=4, outputs=8, kept=8),
        PartitionBytes(weights=480, buffers=80, trainable=400, optimizer=800, inputs=8, outputs=8, kept=8),
    ]
    return dataclasses.replace(Setting(partitions, SAMPLES), **changes)


def program(method: str, **options: Any) -> list[Visit | Sweep]:
    config = configure(max_gpu_mem="1GB", model="mlp:4-3-2", data="digits", method=method, batch_size=16, **options)
    return make_method(config).program(2, SAMPLES)


def counted(partition: int, micro_batch: int = 5) -> float:
    """Forward seconds of an epoch of a partition, micro-batch by micro-batch."""
    seconds = 0.0
    for begin in range(0, SAMPLES["train"], 16):
        batch = min(16, SAMPLES["train"] - begin)
        for part in micro_batches(batch, micro_batch, smallest=2):
            for layer in FORWARD[2 * partition : 2 * partition + 2]:
                seconds += layer.fixed + layer.per_sample * (part.stop - part.start)
    return seconds


@pytest.mark.parametrize("micro_batch", [2, 3, 5, 16])
def test_learning_is_counted_micro_batch_by_micro_batch(micro_batch: int) -> None:
    items = program("pnn", epochs=(3, 2))
    expected = 3 * counted(0, micro_batch) + 2 * counted(1, micro_batch)
    assert whole(items, plan(micro_batch), setting(), rates()).seconds == pytest.approx(expected)
    expected = counted(0, micro_batch) + counted(1, micro_batch)
    assert one_epoch(items, plan(micro_batch), setting(), rates()).seconds == pytest.approx(expected)


def test_exact_runs_all_but_the_last_partition_forward_twice() -> None:
    found = one_epoch(program("exact", epochs=3), plan(), setting(), rates())
    assert found.seconds == pytest.approx(2 * counted(0) + counted(1))
    assert whole(program("exact", epochs=3), plan(), setting(), rates()).seconds == pytest.approx(3 * found.seconds)


def test_every_step_is_counted_and_none_twice() -> None:
    # 4 batches an epoch; 10 parameters in one partition, 100 in the other.
    found = one_epoch(program("pnn", epochs=3), plan(), setting(), rates(layers=(LayerTimings(*[NOTHING] * 4),) * 4, step=1.0))
    assert found.seconds == pytest.approx(4 * 110)
    found = one_epoch(program("exact", epochs=3), plan(), setting(), rates(layers=(LayerTimings(*[NOTHING] * 4),) * 4, step=1.0))
    assert found.seconds == pytest.approx(4 * 110)


def test_validation_and_writing_are_eval_forwards() -> None:
    layers = tuple(LayerTimings(NOTHING, NOTHING, NOTHING, Seconds(0.0, 10.0**layer)) for layer in range(4))
    # The first partition's outputs are written once for its epochs, of training and validation samples.
    expected = 7 * (1111) + (50 + 7) * 11 / 3
    assert one_epoch(program("pnn", epochs=3), plan(), setting(), rates(layers=layers)).seconds == pytest.approx(expected)
    assert one_epoch(program("exact", epochs=3), plan(), setting(), rates(layers=layers)).seconds == pytest.approx(7 * 1111)


def test_only_the_first_layer_of_a_partition_that_learns_apart_gives_its_inputs_no_gradient() -> None:
    layers = tuple(LayerTimings(NOTHING, Seconds(0.0, 1.0), Seconds(0.0, 1000.0), NOTHING) for _ in range(4))

    def seconds(method: str, **changes: Any) -> float:
        return one_epoch(program(method), plan(), setting(**changes), rates(layers=layers)).seconds

    assert seconds("pnn") == pytest.approx(50 * 2002)
    assert seconds("exact") == pytest.approx(50 * 1003)
    assert seconds("neuroflux", per_layer_loss=True) == pytest.approx(50 * 4000)


def test_smaller_micro_batches_take_no_less() -> None:
    for method in ("pnn", "exact", "neuroflux"):
        seconds = [one_epoch(program(method), plan(size), setting(), rates()).seconds for size in (16, 8, 4, 2)]
        assert seconds == sorted(seconds)


def test_a_sweep_reads_weights_twice_and_state_once() -> None:
    found = one_epoch(program("exact"), plan(), setting(), rates())
    # Of two partitions the last stays from forward to backward, and the first from one batch to the next. The validation reads both.
    measured = 48 + 480 + 7 * 8
    # Nothing that crosses is kept in memory: activations and their gradients, once each.
    assert found.read == 4 * (48 + 480 + 80 + 800) + 2 * 50 * 8 + measured
    assert found.written == 4 * (40 + 80 + 8 + 400 + 800 + 80) + 2 * 50 * 8 + 7 * 8


def test_moving_bytes_takes_time_beyond_what_the_streams_hold() -> None:
    items, some = program("exact"), rates(layers=(LayerTimings(*[NOTHING] * 4),) * 4, read=1.0)
    alone = one_epoch(items, plan(), setting(), some).seconds
    ahead = one_epoch(items, plan(), setting(stream_bytes=50), some).seconds
    assert 0 < ahead < alone


def test_work_adds_up() -> None:
    assert Work(1.0, 2, 3) + Work(0.5, 1, 1) == Work(1.5, 3, 4)
    assert [seconds_text(value) for value in (0.0, 0.5, 9.876, 98.76, 987.6)] == ["0.000", "0.500", "9.88", "98.8", "988"]


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
    (found,) = [one for one in plan_run(asked).prospects if one.asked]
    start_run(asked, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    ends = [line for line in lines if "samples_per_second" in line]
    moved = {name: ends[2][name] - ends[1][name] for name in ("bytes_read", "bytes_written")}
    assert found.bytes_written_per_epoch == pytest.approx(moved["bytes_written"], rel=0.05)
    assert found.bytes_read_per_epoch == pytest.approx(moved["bytes_read"], rel=0.05)


def test_all_methods_are_forecast_side_by_side() -> None:
    prospects = {one.method: one for one in plan_run(config(method="pnn", kappa=1.0)).prospects}
    assert list(prospects) == ["pnn", "neuroflux", "exact", "backprop"]
    assert [name for name, one in prospects.items() if one.asked] == ["pnn"]
    assert all(one.fits and one.seconds_per_epoch > 0 and one.measured_share == 1 for one in prospects.values())
    assert {name: one.partitions for name, one in prospects.items()} == {"pnn": 4, "neuroflux": 4, "exact": 4, "backprop": 1}
    # Three epochs, and each partition's weights moved once.
    assert prospects["pnn"].seconds == pytest.approx(3 * prospects["pnn"].seconds_per_epoch)


def test_a_method_that_cannot_says_why() -> None:
    prospects = {one.method: one for one in plan_run(config(batch_size="auto", cuts=None)).prospects}
    assert "--batch-size auto" in prospects["exact"].reason
    assert not prospects["exact"].fits
    tight = plan_run(config(method="exact", cuts=None, model="mlp:64-1024-1024-1024-10", max_gpu_mem="45MB"))
    whole_model = next(one for one in tight.prospects if one.method == "backprop")
    assert whole_model.enough_bytes is not None
    assert whole_model.enough_bytes > 45_000_000
    assert "fits from" in str(tight)


# Plans for time.


def planned(seconds_of: Any, **options: Any) -> Plan:
    given = {"method": "exact", "cuts": None, "plan_for": "time", "model": "mlp:64-512-512-512-512-10", "max_gpu_mem": "24MB"}
    asked = config(**{**given, **options})
    with CpuDevice(asked.max_gpu_mem) as device:
        workload = make_workload(asked, *named_inputs(asked), device.torch_device)
        return make_plan(workload, profile_workload(workload, device), device, seconds_of=seconds_of)


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
    given = {"max_gpu_mem": "24MB", "timing": False, "device": "cpu", "batch_size": 64, **options}
    return lowmem_pnn.plan(build, data, **given)


def test_exact_recomputes_less_with_smaller_micro_batches() -> None:
    by_size, by_default = (of_convolutions(False, method="exact", plan_for=wish) for wish in ("size", "auto"))
    (only,) = by_default.partitions
    assert len(by_size.partitions) == 2
    assert only["micro_batch"] < by_size.partitions[0]["micro_batch"]
    assert of_convolutions(False, method="exact").partitions == by_default.partitions, "the default, and always the same"
    assert by_default.predicted_peak_bytes <= 24_000_000


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
        assert window <= found.stream_bytes <= 2 * window
        assert all(part.predicted_peak_bytes <= budget for part in found.partitions)
    assert roomy.stream_bytes == 2 * BufferSizes.of_budget(100_000_000).stream_bytes
    assert Plan.from_json(roomy.to_json()) == roomy


# Nominal timings.


def test_nominal_timings_are_sums_of_counts() -> None:
    speed = MachineSpeed(
        mac=1.0, forward_weight=1e3, backward_weight=1e4, call=1e6, memory_byte=1e9, step=2.0, read_byte=3.0, written_byte=4.0
    )
    nothing = Affine(0, 0)
    layer = LayerCost("a", 7, 28, 0, 28, 56, 0, nothing, Affine(5, 3), nothing, nothing, nothing, nothing, forward_macs=11)
    timings = nominal_timings(MemoryProfile((layer,)), speed)
    assert (timings.step_per_parameter, timings.read_per_byte, timings.write_per_byte, timings.memory_per_byte) == (
        2.0,
        3.0,
        4.0,
        1e9,
    )
    (seconds,) = timings.layers
    assert seconds.forward == seconds.emit == Seconds(1e6 + 7e3, 11 + 3e9)
    assert seconds.backward == Seconds(2e6 + 7e4, 22 + 6e9)
    assert seconds.backward_to_weights == Seconds(2e6 + 7e4, 11 + 6e9)


def test_a_run_that_is_planned_for_time_ends_and_keeps_its_plan(tmp_path: Path) -> None:
    asked = config(method="exact", cuts=None, plan_for="time", epochs=2, model="mlp:64-512-512-512-512-10", max_gpu_mem="24MB")
    with pytest.raises(Stopped):
        start_run(asked, tmp_path / "run", should_stop=stop_at(2))
    before = json.loads((tmp_path / "run" / "journal.json").read_text())["body"]["plan"]
    result = resume_run(tmp_path / "run")
    assert result is not None
    assert result.peak_bytes <= 24_000_000
    assert [part["stop"] for part in result.partitions] == [part["stop"] for part in before["partitions"]]


def test_plans_for_time_need_something_to_choose() -> None:
    for options, text in (
        ({"cuts": (1,)}, "needs cuts that are left"),
        ({"batch_size": "auto", "method": "pnn"}, "--batch-size auto"),
        ({"parallel_sil": True, "method": "pnn"}, "a plan of their own"),
    ):
        with pytest.raises(ConfigError, match=text):
            config(**{"cuts": None, "method": "exact", "plan_for": "time", **options})
