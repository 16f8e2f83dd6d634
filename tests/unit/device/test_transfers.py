"""Copies beside the computing, on a simulated device whose every copy is done at the last moment: order, reuse of memory, bounds."""

import gc
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.device.simulated import DelayedCopies
from lowmem_pnn.device.transfers import Transfers, overlapped_downloads
from lowmem_pnn.memory.pinned import PinnedSlab


def slab_of(size: int) -> PinnedSlab:
    return PinnedSlab(lambda size: torch.empty(size, dtype=torch.uint8), size)


def transfers_of(limit: int = 1 << 20, slab: int = 1 << 20) -> Transfers:
    return Transfers(DelayedCopies(), torch.device("cpu"), limit, slab_of(slab))


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


# Whole runs.


def test_a_tensor_that_is_larger_than_the_slab_goes_through_it_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = transfers_of(limit=1 << 10, slab=1 << 16)
    sizes: dict[str, list[int]] = {"upload": [], "download": []}

    def count(way: str) -> None:
        copy = getattr(transfers._engine, way)
        monkeypatch.setattr(transfers._engine, way, lambda one, other: (sizes[way].append(one.nbytes), copy(one, other))[1])

    count("upload")
    count("download")
    tensor = torch.randn(7, 10_001)
    (on_device,) = transfers.to_device([tensor])
    assert torch.equal(transfers.download(on_device).get(), tensor)
    for way in ("upload", "download"):
        assert sum(sizes[way]) == tensor.nbytes
        assert max(sizes[way]) == 1 << 14, "a quarter of the slab"


def test_a_reader_gets_the_memory_of_uploads_that_are_complete(pool: ThreadPoolExecutor) -> None:
    transfers = transfers_of(slab=1 << 12)
    for _ in range(3):
        upload = transfers.upload([torch.ones(400)])
        assert upload is not None
        upload.get()  # waits, so that the copy is done
        piece = pool.submit(transfers.empty, (500,), torch.float32).result()
        assert transfers.slab.owns(piece)
        del piece


def test_a_slab_that_the_system_refuses_leaves_plain_copies() -> None:
    def refuse(size: int) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    transfers = Transfers(DelayedCopies(), torch.device("cpu"), 1 << 20, PinnedSlab(refuse, 1 << 20))
    (tensor,) = transfers.to_device([torch.ones(10)])
    assert tensor.tolist() == transfers.download(tensor).get().tolist() == [1.0] * 10
    assert transfers.empty((3,), torch.float32).shape == (3,)
