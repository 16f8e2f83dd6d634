"""Forecasts: sums over a program against counting batch by batch; bytes against what small runs report."""

import dataclasses
from typing import Any

import pytest

from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.engine.micro_batches import micro_batches
from lowmem_pnn.methods import Sweep, Visit, make_method
from lowmem_pnn.partition_plan import PartitionPlan, Plan
from lowmem_pnn.planning.forecast import ForecastInputs, PartitionBytes, TimeAndTraffic, forecast_epoch, forecast_training
from lowmem_pnn.profiling.timings import LayerTimings, MachineTimings, Seconds
from lowmem_pnn.units import seconds_text

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


def timings(**changes: Any) -> MachineTimings:
    layers = tuple(LayerTimings(one, NOTHING, NOTHING, NOTHING) for one in FORWARD)
    return dataclasses.replace(
        MachineTimings(layers, step_per_parameter=0.0, read_per_byte=0.0, write_per_byte=0.0, memory_per_byte=0.0), **changes
    )


def inputs(**changes: Any) -> ForecastInputs:
    partitions = [
        PartitionBytes(weights=48, buffers=8, trainable=40, optimizer=80, inputs=4, outputs=8, stored_outputs=8),
        PartitionBytes(weights=480, buffers=80, trainable=400, optimizer=800, inputs=8, outputs=8, stored_outputs=8),
    ]
    return dataclasses.replace(ForecastInputs(partitions, SAMPLES), **changes)


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
    assert forecast_training(items, plan(micro_batch), inputs(), timings()).seconds == pytest.approx(expected)
    expected = counted(0, micro_batch) + counted(1, micro_batch)
    assert forecast_epoch(items, plan(micro_batch), inputs(), timings()).seconds == pytest.approx(expected)


def test_exact_runs_all_but_the_last_partition_forward_twice() -> None:
    forecast = forecast_epoch(program("exact", epochs=3), plan(), inputs(), timings())
    assert forecast.seconds == pytest.approx(2 * counted(0) + counted(1))
    assert forecast_training(program("exact", epochs=3), plan(), inputs(), timings()).seconds == pytest.approx(
        3 * forecast.seconds
    )


def test_every_step_is_counted_and_none_twice() -> None:
    # 4 batches an epoch; 10 parameters in one partition, 100 in the other.
    forecast = forecast_epoch(
        program("pnn", epochs=3), plan(), inputs(), timings(layers=(LayerTimings(*[NOTHING] * 4),) * 4, step_per_parameter=1.0)
    )
    assert forecast.seconds == pytest.approx(4 * 110)
    forecast = forecast_epoch(
        program("exact", epochs=3), plan(), inputs(), timings(layers=(LayerTimings(*[NOTHING] * 4),) * 4, step_per_parameter=1.0)
    )
    assert forecast.seconds == pytest.approx(4 * 110)


def test_validation_and_writing_are_eval_forwards() -> None:
    layers = tuple(LayerTimings(NOTHING, NOTHING, NOTHING, Seconds(0.0, 10.0**layer)) for layer in range(4))
    # The first partition's outputs are written once for its epochs, of training and validation samples.
    expected = 7 * (1111) + (50 + 7) * 11 / 3
    assert forecast_epoch(program("pnn", epochs=3), plan(), inputs(), timings(layers=layers)).seconds == pytest.approx(expected)
    assert forecast_epoch(program("exact", epochs=3), plan(), inputs(), timings(layers=layers)).seconds == pytest.approx(7 * 1111)


def test_only_the_first_layer_of_a_partition_with_a_loss_of_its_own_has_no_input_gradient() -> None:
    layers = tuple(LayerTimings(NOTHING, Seconds(0.0, 1.0), Seconds(0.0, 1000.0), NOTHING) for _ in range(4))

    def seconds(method: str, **changes: Any) -> float:
        return forecast_epoch(program(method), plan(), inputs(**changes), timings(layers=layers)).seconds

    assert seconds("pnn") == pytest.approx(50 * 2002)
    assert seconds("exact") == pytest.approx(50 * 1003)
    assert seconds("neuroflux", per_layer_loss=True) == pytest.approx(50 * 4000)


def test_smaller_micro_batches_take_no_less() -> None:
    for method in ("pnn", "exact", "neuroflux"):
        seconds = [forecast_epoch(program(method), plan(size), inputs(), timings()).seconds for size in (16, 8, 4, 2)]
        assert seconds == sorted(seconds)


def test_a_sweep_reads_weights_twice_and_state_once() -> None:
    forecast = forecast_epoch(program("exact"), plan(), inputs(), timings())
    # Of two partitions the last stays from forward to backward, and the first from one batch to the next. The validation reads both.
    measured = 48 + 480 + 7 * 8
    # Nothing that crosses is kept in memory: activations and their gradients, once each.
    assert forecast.bytes_read == 4 * (48 + 480 + 80 + 800) + 2 * 50 * 8 + measured
    assert forecast.bytes_written == 4 * (40 + 80 + 8 + 400 + 800 + 80) + 2 * 50 * 8 + 7 * 8


def test_moving_bytes_takes_time_beyond_what_the_streams_hold() -> None:
    items, some = program("exact"), timings(layers=(LayerTimings(*[NOTHING] * 4),) * 4, read_per_byte=1.0)
    alone = forecast_epoch(items, plan(), inputs(), some).seconds
    ahead = forecast_epoch(items, plan(), inputs(stream_bytes=50), some).seconds
    assert 0 < ahead < alone


def test_times_and_traffic_add_up() -> None:
    assert TimeAndTraffic(1.0, 2, 3) + TimeAndTraffic(0.5, 1, 1) == TimeAndTraffic(1.5, 3, 4)
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


def test_kept_products_are_written_and_read_once_a_batch_and_save_most_of_the_second_forward() -> None:
    items, rates = program("exact"), timings(write_per_byte=0.0, read_per_byte=0.0)
    before = forecast_epoch(items, plan(), inputs(), rates)
    partitions = [dataclasses.replace(part, kept=kept) for part, kept in zip(inputs().partitions, (100, 0), strict=True)]
    after = forecast_epoch(items, plan(), inputs(partitions=partitions, kept_shares={1: 0.5}), rates)
    assert (after.bytes_read - before.bytes_read, after.bytes_written - before.bytes_written) == (5000, 5000)
    # Of layer 1, which goes forward twice in training.
    sizes = [part.stop - part.start for begin in range(0, 50, 16) for part in micro_batches(min(16, 50 - begin), 5, smallest=2)]
    assert before.seconds - after.seconds == pytest.approx(0.9 * 0.5 * sum(0.5 + 10.0 * size for size in sizes))


def test_epochs_in_which_less_is_learnt_weigh_by_their_number() -> None:
    [sweep] = program("exact", epochs=4)
    frozen = dataclasses.replace(sweep, epochs=3, visits=tuple(visit for visit in sweep.visits if visit.partition == 1))
    items = [Visit("emit", 0, "train"), frozen, dataclasses.replace(sweep, epochs=1)]
    written, early, late = (forecast_training([item], plan(), inputs(), timings()).seconds for item in items)
    assert 0 < early < 3 * late
    expected = (written + early + late) / 4
    assert forecast_epoch(items, plan(), inputs(), timings()).seconds == pytest.approx(expected)
    assert forecast_training(items, plan(), inputs(), timings()).seconds == pytest.approx(4 * expected)
