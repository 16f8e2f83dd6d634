"""The next partition's file is asked for while the last epoch of a partition runs."""

import threading
from pathlib import Path
from typing import Any

import pytest

import lowmem_pnn
from helpers.simulated import fit_on
from helpers.small_networks import images, small_conv
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.stores import disk


@pytest.mark.parametrize("device", ["cpu", "simulated"])
def test_the_next_partition_is_asked_for_while_the_last_epoch_runs(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int, int, str]] = []
    ends: list[int] = []

    def note(path: Path, start: int, stop: int) -> None:
        asked.append((path.name.split(".")[0], start, stop, threading.current_thread().name))

    class Watch(Display):
        def end_epoch(self, line: Any) -> None:
            ends.append(len(asked))

    monkeypatch.setattr(disk, "prefetch_into_page_cache", note)
    options: dict[str, Any] = {"cuts": "1,2", "epochs": 3, "batch_size": 8, "val_fraction": 0.0, "display": Watch()}
    if device == "cpu":
        lowmem_pnn.fit(small_conv, images(32), max_gpu_mem="300MB", device="cpu", workdir=tmp_path / "run", **options)
    else:
        fit_on(SimulatedDevice(30_000_000), monkeypatch, small_conv, images(32), workdir=tmp_path / "run", **options)
    # Of each of two partitions' successors a share after each of the four batches of the last of three epochs.
    assert [name for name, *_ in asked] == ["p001"] * 4 + ["p002"] * 4
    assert all(thread.startswith("lowmem-read") for *_, thread in asked)
    for pieces in (asked[:4], asked[4:]):
        starts, stops = [start for _, start, _, _ in pieces], [stop for _, _, stop, _ in pieces]
        assert starts == [0, *stops[:-1]]
        assert stops[-1] > 0
    # Nothing in the first two epochs; three of four shares at the latest before the last epoch is over; all before the load.
    assert ends[:2] == [0, 0]
    assert 3 <= ends[2] <= 4
    assert ends[3:5] == [4, 4]
