"""Copies beside the computing, on a simulated device whose every copy is done at the last moment: order, reuse of memory, bounds."""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lowmem_pnn
from helpers.plainloops import assert_same_weights, loaded
from helpers.simulated import fit_on, resident
from helpers.small_networks import images, small_conv
from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.device.simulated import DelayedCopies
from lowmem_pnn.device.transfers import Transfers, in_flight_bytes_of, overlapped_downloads
from lowmem_pnn.engine import executor as executor_module
from lowmem_pnn.engine.executor import EpochProgress, Executor
from lowmem_pnn.engine.loaders import Batch, DatasetLoader
from lowmem_pnn.engine.uploads import Piece, Uploads
from lowmem_pnn.memory.pinned import PinnedSlab
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.sources.splits import from_torch
from lowmem_pnn.stores import disk


def slab_of(size: int) -> PinnedSlab:
    return PinnedSlab(lambda size: torch.empty(size, dtype=torch.uint8), size)


def transfers_of(limit: int = 1 << 20, slab: int = 1 << 20) -> Transfers:
    return Transfers(DelayedCopies(), torch.device("cpu"), limit, slab_of(slab))


# The slab.


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 5)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_pieces_of_the_slab_never_overlap_and_all_come_back(steps: list[tuple[int, int]]) -> None:
    slab, held = slab_of(2048), []
    for number, (size, drop) in enumerate(steps):
        piece = slab.lend((size,), torch.uint8)
        if piece is not None:
            assert piece.data_ptr() % 64 == slab._slab.data_ptr() % 64  # type: ignore[union-attr]
            held.append((piece.fill_(number), number))
        if drop < len(held):
            del held[drop]
        piece = None
        assert all(tensor.eq(value).all() for tensor, value in held)
        assert slab.lent_bytes == sum(-(-max(1, len(tensor)) // 64) * 64 for tensor, _ in held) <= slab.size
    held.clear()
    assert slab.lend((2048,), torch.uint8) is not None, "no hole is left"


def test_the_slab_is_allocated_when_it_is_used_and_given_back_when_nothing_of_it_is() -> None:
    slab = slab_of(1024)
    assert slab.held_bytes == 0
    piece = slab.lend((3, 4), torch.float32, (1, 3))
    assert piece is not None
    assert (piece.shape, piece.stride(), slab.held_bytes) == ((3, 4), (1, 3), 1024)
    view = piece[1]
    del piece
    slab.close()
    assert slab.held_bytes == 1024, "a view holds its piece"
    del view
    slab.close()
    assert slab.held_bytes == 0


# Copies one by one.


@pytest.mark.parametrize("slab", [1 << 20, 1024, 64], ids=["room", "little room", "no room"])
def test_values_types_and_strides_come_as_plain_copies_bring_them(slab: int) -> None:
    transfers = transfers_of(slab=slab)
    base = torch.randn(2, 3, 4, 5)
    tensors = [
        base, base.permute(0, 3, 1, 2), base.to(memory_format=torch.channels_last), base[:, 1], base[:, :1].expand(2, 3, 4, 5),
        torch.randn(()), torch.empty(0, 3), torch.arange(6).to(torch.bfloat16), torch.tensor([True, False]), torch.arange(5),
    ]  # fmt: skip
    for tensor, on_device in zip(tensors, transfers.to_device(tensors), strict=True):
        assert torch.equal(tensor, on_device)
        assert (on_device.dtype, on_device.stride()) == (tensor.dtype, torch.empty_like(tensor).stride())
        assert on_device.data_ptr() != tensor.data_ptr() or not tensor.numel()
    for tensor in tensors:
        host = transfers.download(tensor).get()
        assert torch.equal(tensor, host)
        assert (host.dtype, host.stride()) == (tensor.dtype, torch.empty_like(tensor).stride())


def test_a_host_tensor_may_be_written_to_as_soon_as_its_upload_has_begun() -> None:
    transfers, host = transfers_of(), torch.ones(100)
    upload = transfers.upload([host])
    assert upload is not None
    host.zero_()
    (tensor,) = upload.get()
    assert tensor.unique().tolist() == [1]


def test_the_device_has_nothing_before_the_upload_is_taken_so_that_taking_it_is_what_waits() -> None:
    transfers = transfers_of()
    upload = transfers.upload([torch.ones(100)])
    assert upload is not None
    assert upload.tensors[0].isnan().all(), "the simulated copy is delayed"
    (tensor,) = upload.get()
    assert tensor.unique().tolist() == [1]


def test_many_uploads_go_through_a_slab_with_room_for_two() -> None:
    transfers = transfers_of(slab=2 * 4096)
    uploads = [transfers.upload([torch.full((1024,), float(number))]) for number in range(20)]
    for number, upload in enumerate(uploads):
        assert upload is not None
        (tensor,) = upload.get()
        assert tensor.unique().tolist() == [number]
    assert transfers.slab.lent_bytes <= transfers.slab.size


def test_copies_in_flight_stay_within_the_limit() -> None:
    transfers = transfers_of(limit=1000)
    first = transfers.upload([torch.ones(100), torch.ones(50)])
    assert first is not None
    assert transfers.in_flight_bytes == 600
    assert transfers.upload([torch.ones(101)]) is None
    second = transfers.upload([torch.ones(100)])
    assert second is not None
    assert transfers.in_flight_bytes == 1000
    first.get()
    assert transfers.in_flight_bytes == 400, "what was taken is the taker's"
    second.close()
    assert transfers.in_flight_bytes == 0
    downloads = []
    for number in range(10):
        downloads.append(transfers.download(torch.full((100,), float(number))))
        assert transfers.in_flight_bytes <= 1000
    larger = transfers.download(torch.full((1000,), 5.0))
    assert larger.get().unique().tolist() == [5]
    assert [download.get().unique().tolist() for download in downloads] == [[number] for number in range(10)]
    assert transfers.in_flight_bytes == 0


def test_a_view_counts_with_all_the_memory_that_it_holds() -> None:
    transfers = transfers_of(limit=1000)
    download = transfers.download(torch.ones(200)[:10])
    assert transfers.in_flight_bytes == 800
    assert download.get().tolist() == [1.0] * 10


def test_a_download_holds_the_tensor_of_the_device_until_the_copy_is_over_and_no_longer() -> None:
    with SimulatedDevice(1 << 20) as device:
        download = device.download(torch.ones(1000))
        gc.collect()
        assert device.used_bytes() == 4000
        host = download.get()
        assert device.used_bytes() == 0
        assert host.unique().tolist() == [1]
        # Nobody waits for this one.
        device.download(torch.ones(1000))
        assert device.used_bytes() == 4000
        device.finish_transfers()
        assert device.used_bytes() == 0
        assert device.transfers is not None
        del host, download
        assert device.transfers.slab.lent_bytes == 0


def test_downloads_are_waited_for_on_another_thread_while_others_begin(pool: ThreadPoolExecutor) -> None:
    transfers = transfers_of(limit=4000, slab=8192)
    begun = threading.Event()

    def check(download: Any, number: int) -> bool:
        begun.wait()
        return bool(download.get().eq(number).all())

    futures = []
    for number in range(50):
        futures.append(pool.submit(check, transfers.download(torch.full((200,), float(number))), number))
        begun.set()
    assert all(future.result() for future in futures)
    assert transfers.in_flight_bytes == 0


def test_each_of_the_overlapped_downloads_is_waited_for_after_the_next_has_begun() -> None:
    transfers, begun = transfers_of(), []

    def begin() -> Iterator[tuple[int, Any]]:
        for number in range(3):
            begun.append(number)
            yield number, transfers.download(torch.tensor([number]))

    seen = [(number, host.tolist(), len(begun)) for number, host in overlapped_downloads(begin())]
    assert seen == [(0, [0], 2), (1, [1], 3), (2, [2], 3)]


def test_an_upload_that_runs_out_of_memory_leaves_nothing_behind() -> None:
    host = [torch.ones(1000), torch.ones(4000)]
    with SimulatedDevice(1 << 20, 15_000) as device:
        transfers = device.transfers
        assert transfers is not None
        with pytest.raises(torch.OutOfMemoryError) as raised:
            device.upload(host)
        assert device.used_bytes() == 0, "the exception, which is still here, holds no tensor"
        assert (transfers.in_flight_bytes, transfers.slab.lent_bytes) == (0, 0)
        assert "out of memory" in str(raised.value)
        with pytest.raises(torch.OutOfMemoryError):
            transfers.to_device(host)
        assert device.used_bytes() == 0
        upload = device.upload(host[:1])
        assert upload is not None
        upload.close()
        assert device.used_bytes() == 0


def test_a_reader_gets_page_locked_memory_only_as_far_as_copies_can_do_without_it() -> None:
    transfers = transfers_of(slab=4096)
    first = transfers.empty((512,), torch.float32)
    second = transfers.empty((512,), torch.float32)
    assert (transfers.slab.owns(first), transfers.slab.owns(second)) == (True, False)
    first.fill_(1)
    # It goes up as it is.
    before = transfers.slab.lent_bytes
    upload = transfers.upload([first])
    assert upload is not None
    assert transfers.slab.lent_bytes == before
    del first
    assert transfers.slab.lent_bytes == before, "not used again before the copy is over"
    (tensor,) = upload.get()
    assert tensor.unique().tolist() == [1]


# Micro-batches.


def _batch(number: int, size: int = 4) -> Batch:
    return (torch.full((size, 3), float(number)),), torch.arange(size)


def test_the_next_piece_is_brought_up_and_one_that_is_not_wanted_any_more_is_dropped() -> None:
    with SimulatedDevice(1 << 20) as device:
        uploads = Uploads(device)
        one, other = _batch(1), _batch(2)
        first, second = Piece.of(one, slice(0, 2)), Piece.of(other, slice(0, 2))
        uploads.take(first, second)
        used = device.used_bytes()
        (tensor,) = uploads.take(second)
        assert tensor.tolist() == [[2.0] * 3] * 2
        assert device.used_bytes() == used, "it was there already"
        uploads.take(first, second)
        (tensor,) = uploads.take(Piece.of(other, slice(0, 1)))
        assert tensor.tolist() == [[2.0] * 3]
        del tensor
        uploads.take(first, second)
        uploads.drop()
        assert device.transfers is not None
        assert device.transfers.in_flight_bytes == 0


def test_pieces_beyond_the_limit_are_asked_for_once() -> None:
    asked: list[int] = []

    def piece(number: int) -> Piece:
        def tensors() -> tuple[Tensor, ...]:
            asked.append(number)
            return (torch.full((100,), float(number)),)

        return Piece(number, tensors)

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
        stage = resident(small_conv, (3, 8, 8), device, pool, batch_size=8, micro_batch=4)
        _log_copies(device, log, monkeypatch)
        loader = DatasetLoader(from_torch(images(16)), 0, pool, mix=False)
        Executor(device, 0).learn_epoch(stage, loader, EpochProgress(), lambda loss: None)
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
        stage = resident(small_conv, (3, 8, 8), device, pool, batch_size=8, micro_batch=4)
        _log_copies(device, log, monkeypatch)
        loader, writer = DatasetLoader(from_torch(images(12)), 0, pool, mix=False), Writer()
        Executor(device, 0).emit(stage, loader, writer, lambda: None)  # type: ignore[arg-type]
        (samples,), _ = next(iter(loader.batches(12, shuffle=False)))
        with torch.no_grad():
            tensors: tuple[Tensor, ...] = (samples.clone(),)
            for layer in stage.residency.layers:
                tensors = layer(*tensors)
        torch.testing.assert_close(torch.cat(writer.kept), tensors[0])
    assert log == [
        "upload", "upload", "compute", "download", "upload", "compute", "download", "wait", "write", "compute", "download",
        "wait", "write", "wait", "write",
    ]  # fmt: skip


# Whole runs.

METHODS: list[dict[str, Any]] = [
    {"method": "backprop"},
    {"method": "pnn", "cuts": "1,2"},
    {"method": "neuroflux", "cuts": "2"},
    {"method": "exact", "cuts": "1,2,3"},
    {"method": "exact", "cuts": "2", "clip_norm": 0.1, "optimizer": "adamw"},
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

    monkeypatch.setattr(disk, "will_need", note)
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


def _is_cached(path: Path) -> bool:
    """Whether a file's first page would be read without waiting for the drive."""
    with path.open("rb", buffering=0) as file:
        try:
            return os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux tells what is in its page cache")
def test_advice_about_a_file_brings_its_pages_in(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        if _is_cached(path):
            pytest.skip("this file system keeps its pages")
    except OSError:
        pytest.skip("this file system does not tell")
    disk.will_need(path, 0, 1 << 20)
    until = time.monotonic() + 10
    while not _is_cached(path):
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.01)
    disk.will_need(tmp_path / "none", 0, 1)  # only advice


def test_a_slab_that_the_system_refuses_leaves_plain_copies() -> None:
    def refuse(size: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    transfers = Transfers(DelayedCopies(), torch.device("cpu"), 1 << 20, PinnedSlab(refuse, 1 << 20))
    (tensor,) = transfers.to_device([torch.ones(10)])
    assert tensor.tolist() == transfers.download(tensor).get().tolist() == [1.0] * 10
    assert transfers.empty((3,), torch.float32).shape == (3,)
