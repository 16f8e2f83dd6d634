"""Runs with copies beside the computing, on a simulated device whose copies are done at the last moment."""

from pathlib import Path
from typing import Any

import pytest

import lowmem_pnn
from helpers.plainloops import assert_same_weights, loaded, step_lines
from helpers.simulated import fit_on
from helpers.small_networks import images, small_conv, small_mlp, vectors
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.device.transfers import Transfers, in_flight_bytes_of
from lowmem_pnn.errors import DivergedError, Stopped
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.sweep import sweeper

METHODS: list[dict[str, Any]] = [
    {"method": "backprop"},
    {"method": "pnn", "cuts": "1,2"},
    {"method": "neuroflux", "cuts": "2"},
    {"method": "exact", "cuts": "1,2,3"},
    {"method": "exact", "cuts": "2", "clip_norm": 0.1, "optimizer": "adamw"},
    {"method": "exact", "cuts": "1,3", "precision": "fp16", "recompute": "never"},
    {"method": "pnn", "cuts": "2", "recovery_epochs": 1},
]


@pytest.mark.parametrize("options", METHODS, ids=lambda options: "-".join(map(str, options.values())))
def test_a_run_with_delayed_copies_is_as_one_without_copies(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and scores, bit by bit: whoever used a tensor before it was there, or memory that a copy still needed, would differ."""
    options = {"epochs": 2, "batch_size": 16, "micro_batch": 8, "val_fraction": 0.2, **options}
    data = images(48)
    plain = lowmem_pnn.fit(small_conv, data, test=data, max_gpu_mem="300MB", device="cpu", workdir=tmp_path / "cpu", **options)
    device, most = SimulatedDevice(30_000_000), 0
    enter = Transfers._claim

    def watch(self: Transfers, nbytes: int) -> bool:
        nonlocal most
        entered = enter(self, nbytes)
        most = max(most, self.in_flight_bytes)
        return entered

    monkeypatch.setattr(Transfers, "_claim", watch)
    result = fit_on(device, monkeypatch, small_conv, data, test=data, workdir=tmp_path / "delayed", **options)
    assert [part["micro_batch"] for part in result.partitions] == [part["micro_batch"] for part in plain.partitions]
    assert_same_weights(loaded(small_conv, result.weights_file), loaded(small_conv, plain.weights_file))
    assert (result.test_accuracy, result.test_loss) == (plain.test_accuracy, plain.test_loss)
    assert 0 < most <= in_flight_bytes_of(device.budget_bytes)
    assert result.peak_bytes <= result.predicted_peak_bytes


def test_a_run_whose_limit_of_copies_in_flight_is_zero_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"method": "exact", "cuts": "1,2,3", "epochs": 1, "batch_size": 16, "micro_batch": 8}
    plain = lowmem_pnn.fit(small_conv, images(48), max_gpu_mem="300MB", device="cpu", workdir=tmp_path / "cpu", **options)
    monkeypatch.setattr("lowmem_pnn.device.simulated.in_flight_bytes_of", lambda budget: 0)
    monkeypatch.setattr("lowmem_pnn.device.simulated.slab_bytes_of", lambda budget: 64)
    result = fit_on(SimulatedDevice(30_000_000), monkeypatch, small_conv, images(48), workdir=tmp_path / "delayed", **options)
    assert_same_weights(loaded(small_conv, result.weights_file), loaded(small_conv, plain.weights_file))


@pytest.mark.parametrize("clip_norm", [None, 1e20])
@pytest.mark.parametrize("micro_batch", [4, 12])
def test_what_is_not_finite_is_read_late_and_never_committed(
    clip_norm: float | None, micro_batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the device nobody waits for a loss or a gradient in the midst of a batch: its steps may be done, and are no commit's."""
    options: dict[str, Any] = {
        "method": "exact", "epochs": 3, "batch_size": 12, "optimizer": "sgd", "momentum": 0.0, "lr": 1e5, "cuts": "1,2", "log_every": 1,
        "clip_norm": clip_norm, "commit_every": 0.0, "micro_batch": micro_batch, "compare": False,
    }  # fmt: skip
    with pytest.raises(DivergedError, match="the last commit is kept") as plain:
        lowmem_pnn.fit(small_mlp, vectors(), max_gpu_mem="300MB", device="cpu", workdir=tmp_path / "cpu", **options)
    for more in ({}, {"resume": True}):
        with pytest.raises(DivergedError) as beside:
            fit_on(SimulatedDevice(30_000_000), monkeypatch, small_mlp, vectors(), workdir=tmp_path / "run", **options, **more)
        assert str(beside.value).rpartition(" in ")[2] == str(plain.value).rpartition(" in ")[2], (
            "the same step, of the same partition"
        )
    own, theirs = step_lines(tmp_path / "run"), step_lines(tmp_path / "cpu")
    assert [line["loss"] for line in own] == [line["loss"] for line in theirs]
    assert all(line["loss"] < float("inf") for line in own)


@pytest.mark.parametrize("available", [1 << 40, 6_000, 0], ids=["room for all", "room for some", "no room"])
@pytest.mark.parametrize("options", [{"cuts": "1,2,3"}, {"cuts": "2", "clip_norm": 0.1}], ids=["in backward", "kept"])
def test_a_run_whose_weights_stay_in_host_memory_writes_the_same_files(
    options: dict[str, Any], available: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commits in the middle, a stop and a resume: what is read from memory, and reaches its file later, is what the files would hold."""
    monkeypatch.setattr(sweeper, "available_bytes", lambda device: 2 * available)
    given: dict[str, Any] = {
        "method": "exact", "epochs": 3, "batch_size": 12, "optimizer": "adamw", "val_fraction": 0.2, "commit_every": 1e9, **options,
    }  # fmt: skip
    data = images(48)
    plain = lowmem_pnn.fit(small_conv, data, max_gpu_mem="300MB", device="cpu", workdir=tmp_path / "cpu", **given)

    class StopsInTheSecondEpoch(Display):
        def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
            if epoch == 2:
                raise Stopped("enough")

    with pytest.raises(Stopped):
        fit_on(
            SimulatedDevice(30_000_000),
            monkeypatch,
            small_conv,
            data,
            workdir=tmp_path / "run",
            display=StopsInTheSecondEpoch(),
            **given,
        )
    result = fit_on(SimulatedDevice(30_000_000), monkeypatch, small_conv, data, workdir=tmp_path / "run", resume=True, **given)
    assert_same_weights(loaded(small_conv, result.weights_file), loaded(small_conv, plain.weights_file))
    assert (result.train_loss, result.val_loss) == (plain.train_loss, plain.val_loss)
    # A validation after each epoch, and a commit, before which all is in the files: not after each of its batches.
    assert (result.bytes_written < 0.7 * plain.bytes_written) == (available > 1 << 20)
