"""Runs on a simulated device that fills up, or on which no plan fits."""

from pathlib import Path
from typing import Any

import pytest

from helpers.plainloops import assert_same_weights, loaded, train_by_backprop
from helpers.simulated import Squeeze, fit_on
from helpers.small_networks import images, small_conv
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.errors import BudgetError


def test_a_run_goes_on_with_smaller_micro_batches_when_the_device_fills_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"epochs": 3, "batch_size": 12, "val_fraction": 0.1, "step_in_backward": False}
    data = images()
    device = SimulatedDevice(1 << 30)
    plain = fit_on(device, monkeypatch, small_conv, data, method="backprop", workdir=tmp_path / "plain", **options)

    device = SimulatedDevice(1 << 30)
    display = Squeeze(device, int(plain.peak_bytes * 0.85))
    result = fit_on(
        device, monkeypatch, small_conv, data, method="backprop", workdir=tmp_path / "run", display=display, **options
    )
    assert result.oom_retries == 1
    assert result.partitions[0]["micro_batch"] == 6
    assert "partition 1 of 1 (0 to 3): out of memory; going on with a micro-batch of 6" in display.messages
    expected = train_by_backprop(small_conv, data, micro_batch_of=lambda step: 12 if step < 3 else 6, **options)
    assert_same_weights(loaded(small_conv, result.weights_file), expected)


def test_a_device_that_is_fuller_than_was_thought_gets_another_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"epochs": 1, "batch_size": 16, "method": "backprop"}
    free = fit_on(SimulatedDevice(8_000_000), monkeypatch, small_conv, images(), workdir=tmp_path / "free", **options)
    assert free.partitions[0]["micro_batch"] == 16
    for share in (0.99, 0.5):
        device = SimulatedDevice(8_000_000, int(free.peak_bytes * share))
        result = fit_on(device, monkeypatch, small_conv, images(), workdir=tmp_path / f"run{share}", **options)
        assert result.peak_bytes <= device.capacity_bytes < free.peak_bytes
        assert result.partitions[0]["micro_batch"] < 16


def test_a_run_that_no_plan_fits_says_so_before_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match=r"needs .* above the budget of 30\.0 kB; give --max-gpu-mem"):
        fit_on(SimulatedDevice(30_000), monkeypatch, small_conv, images(), workdir=tmp_path / "run", epochs=1)
    assert not (tmp_path / "run").exists()
    with pytest.raises(BudgetError, match=r"above the budget of 400\.0 kB; give --max-gpu-mem"):
        fit_on(SimulatedDevice(400_000, 30_000), monkeypatch, small_conv, images(), workdir=tmp_path / "run", epochs=1)
