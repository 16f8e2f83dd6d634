"""Uploads of micro-batches, and downloads of outputs, beside the computing."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.simulated import resident
from helpers.small_networks import images, small_conv
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.engine import executor as executor_module
from lowmem_pnn.engine.executor import Executor
from lowmem_pnn.engine.loaders import DatasetLoader
from lowmem_pnn.engine.uploads import MicroBatch, Uploads
from lowmem_pnn.sources.map_split import from_torch
from lowmem_pnn.stores.activations import Batch


def _batch(number: int, size: int = 4) -> Batch:
    return (torch.full((size, 3), float(number)),), torch.arange(size)


def test_the_next_piece_is_brought_up_and_one_that_is_not_wanted_any_more_is_dropped() -> None:
    with SimulatedDevice(1 << 20) as device:
        uploads = Uploads(device)
        one, other = _batch(1), _batch(2)
        first, second = MicroBatch.of(one, slice(0, 2)), MicroBatch.of(other, slice(0, 2))
        uploads.take(first, second)
        used = device.used_bytes()
        (tensor,) = uploads.take(second)
        assert tensor.tolist() == [[2.0] * 3] * 2
        assert device.used_bytes() == used, "it was there already"
        uploads.take(first, second)
        (tensor,) = uploads.take(MicroBatch.of(other, slice(0, 1)))
        assert tensor.tolist() == [[2.0] * 3]
        del tensor
        uploads.take(first, second)
        uploads.drop()
        assert device.transfers is not None
        assert device.transfers.in_flight_bytes == 0


def test_pieces_beyond_the_limit_are_asked_for_once() -> None:
    asked: list[int] = []

    def piece(number: int) -> MicroBatch:
        def tensors() -> tuple[Tensor, ...]:
            asked.append(number)
            return (torch.full((100,), float(number)),)

        return MicroBatch(number, tensors)

    with SimulatedDevice(3200) as device:  # a limit of 100 bytes in flight
        uploads = Uploads(device)
        for number in range(3):
            (tensor,) = uploads.take(piece(number), piece(number + 1))
            assert tensor.unique().tolist() == [number]
    assert asked == [0, 1, 2, 3]


def _log_copies(device: SimulatedDevice, log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Note when a copy begins and when somebody waits for one that goes down."""
    assert device.transfers is not None
    engine = device.transfers._engine

    def noting(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def noted(source: Tensor, target: Tensor) -> Any:
            log.append(name)
            event = work(source, target)
            if name == "download":
                wait = event.wait
                event.wait = lambda: (log.append("wait"), wait())
            return event

        return noted

    for name in ("upload", "download"):
        monkeypatch.setattr(engine, name, noting(name, getattr(engine, name)))


def test_a_micro_batch_goes_up_before_the_one_before_it_is_computed_across_batches_too(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    compute = executor_module.backward_from_loss
    monkeypatch.setattr(
        executor_module, "backward_from_loss", lambda *args: (log.append("compute"), compute(*args))[1]
    )  # fmt: skip
    with SimulatedDevice(1 << 30) as device:
        active = resident(small_conv, (3, 8, 8), device, pool, batch_size=8, micro_batch=4)
        _log_copies(device, log, monkeypatch)
        loader = DatasetLoader(from_torch(images(16)), 0, pool, permuted=False)
        executor = Executor(device, 0)
        for step, (batch, following) in enumerate(executor.over(loader, loader.batches(8, shuffle=False))):
            executor.train_batch(active, batch, step, following)
        assert device.transfers is not None
        assert device.transfers.in_flight_bytes == 0
    # Samples and labels of each of two micro-batches in each of two batches.
    assert log == ["upload"] * 4 + ["compute"] + ["upload"] * 2 + ["compute"] + ["upload"] * 2 + ["compute"] * 2


def test_outputs_go_down_while_the_next_micro_batch_is_computed(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    compute = executor_module.outputs_in_chunks
    monkeypatch.setattr(
        executor_module, "outputs_in_chunks", lambda *args: (log.append("compute"), compute(*args))[1]
    )  # fmt: skip

    class Writer:
        """Keeps what it is given, as a store does: a copy."""

        def __init__(self) -> None:
            self.kept: list[Tensor] = []

        def append(self, tensors: tuple[Tensor, ...], labels: Tensor) -> None:
            log.append("write")
            self.kept.append(tensors[0].clone())

    with SimulatedDevice(1 << 30) as device:
        active = resident(small_conv, (3, 8, 8), device, pool, batch_size=8, micro_batch=4)
        _log_copies(device, log, monkeypatch)
        loader, writer = DatasetLoader(from_torch(images(12)), 0, pool, permuted=False), Writer()
        Executor(device, 0).emit(active, loader, writer, lambda: None)  # type: ignore[arg-type]
        (samples,), _ = next(iter(loader.batches(12, shuffle=False)))
        with torch.no_grad():
            tensors: tuple[Tensor, ...] = (samples.clone(),)
            for layer in active.residency.layers:
                tensors = layer(*tensors)
        torch.testing.assert_close(torch.cat(writer.kept), tensors[0])
    assert log == [
        "upload", "upload", "compute", "download", "upload", "compute", "download", "wait", "write", "compute", "download",
        "wait", "write", "wait", "write",
    ]  # fmt: skip
