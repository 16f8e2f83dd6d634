"""Forecasts: sums over a program against counting batch by batch; bytes against what small runs report."""

import dataclasses
from typing import Any

import pytest

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.engine.passes import micro_batches
from lowmem_pnn.methods import Sweep, Visit, make_method
from lowmem_pnn.partition_plan import PartitionPlan, Plan
from lowmem_pnn.planning.forecast import PartitionBytes, Setting, Work, one_epoch, whole
from lowmem_pnn.profiling.timings import LayerTimings, MachineTimings, Seconds
from lowmem_pnn.units import seconds_text

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
