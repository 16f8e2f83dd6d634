"""The weight streamer of a sweep: failures close every file and the first one is heard of; large tensors move in parts."""

import threading
from pathlib import Path

import pytest
import torch

from lowmem_pnn.device import CpuDevice, SimulatedDevice
from lowmem_pnn.engine.prefetch import WriteBehind
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.errors import DiskError
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.sweep.packs import Piece
from lowmem_pnn.sweep.weight_streamer import WeightStreamer

KEYS = ("weight/a", "weight/b")


@pytest.mark.parametrize("other_failure", [False, True])
def test_a_write_that_fails_leaves_no_file_open_and_replaces_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_failure: bool
) -> None:
    store = WeightStore.create(tmp_path, [{key: (torch.float32, (4,))} for key in KEYS])
    with SimulatedDevice(1 << 30) as device:
        threads = WorkerThreads()
        streamer = WeightStreamer(store, device, threads, 1 << 20, WriteBehind(threads.write, 1 << 20))
        opened: list[TensorFile] = []
        writer = store.writer

        def remembered(partition: int) -> TensorFile:
            opened.append(writer(partition))
            return opened[-1]

        def refuse(*_: object, **__: object) -> None:
            raise DiskError("the drive is full")

        monkeypatch.setattr(store, "writer", remembered)
        monkeypatch.setattr(TensorFile, "write_from", refuse)

        def sweep() -> None:
            for partition, key in enumerate(KEYS):
                with streamer.writing(partition) as (file, _):
                    streamer.write(partition, file, key, torch.zeros(4))
                    threads.write.submit(int).result()  # by now the write has failed
                    if other_failure:
                        raise KeyError("another")
            streamer.finish_writes()

        with pytest.raises(KeyError if other_failure else DiskError, match="another" if other_failure else "the drive is full"):
            sweep()
        streamer.close()
        threads.close()
    assert opened
    assert all(file._file.closed for file in opened)


def test_a_tensor_larger_than_the_stream_is_written_in_parts_that_are_waited_for(tmp_path: Path) -> None:
    values = torch.arange(1000.0)
    store = WeightStore.create(tmp_path, [{"weight/a": (torch.float32, (10, 100)), "weight/b": (torch.float32, (4,))}])
    with CpuDevice(1 << 30) as device:
        threads = WorkerThreads()
        streamer = WeightStreamer(store, device, threads, 800, WriteBehind(threads.write, 800))
        gate = threading.Event()
        threads.write.submit(gate.wait)
        with streamer.writing(0) as (file, is_new):
            assert is_new
            opener = threading.Timer(0.05, gate.set)
            opener.start()
            streamer.write(0, file, "weight/a", values.view(10, 100))
            streamer.finish_writes_in_parts()
            # Whoever unloads the tensor now frees its memory: nothing holds it any more.
            assert gate.is_set()
            assert torch.equal(file.read("weight/a").view(-1), values)
            streamer.write(0, file, "weight/b", torch.ones(2), 2)
        streamer.finish_writes()
        reads: list[int] = []
        with streamer.batch([Piece("weight/b"), Piece("weight/a"), Piece("weight/a", slice(990, 1000))]):
            assert streamer._reader is not None
            read = streamer._reader.read
            streamer._reader.read = lambda *arguments: (reads.append(1), read(*arguments))[1]  # type: ignore[method-assign]
            assert streamer.take().tolist() == [0, 0, 1, 1]
            threads.read.submit(int).result()
            assert len(reads) == 1  # the large one would be in memory while others are used
            assert torch.equal(streamer.take(), values.view(10, 100))
            assert torch.equal(streamer.take(), values[990:])
        streamer.close()
        threads.close()


def test_the_next_pack_goes_up_while_the_present_one_is_used_and_packs_are_one_copy_each(tmp_path: Path) -> None:
    layers = [
        {f"weight/{layer}{name}": (torch.float32, (size,)) for name, size in (("a", 5), ("b", 1000), ("c", 3))}
        for layer in range(3)
    ]
    store = WeightStore.create(tmp_path, layers)
    with SimulatedDevice(1 << 24) as device:
        assert device.transfers is not None
        threads = WorkerThreads()
        streamer = WeightStreamer(store, device, threads, 1 << 20, WriteBehind(threads.write, 1 << 20))
        for number, layer in enumerate(layers):
            with streamer.writing(number) as (file, _):
                for key, (_, (size,)) in layer.items():
                    streamer.write(number, file, key, torch.full((size,), float(number)))
        streamer.finish_writes()
        pieces = [Piece(key, None, number) for number, layer in enumerate(layers) for key in layer]
        with streamer.batch(pieces):
            assert streamer._prefetcher is not None
            threads.read.submit(int).result()
            streamer._prefetcher.start()
            threads.read.submit(int).result()  # all has been read by now
            for number, layer in enumerate(layers):
                taken = [streamer.take() for _ in layer]
                assert [one.unique().tolist() for one in taken] == [[number]] * 3
                assert len({one.untyped_storage().data_ptr() for one in taken}) == 1, "one copy for all of them"
                assert (device.transfers.in_flight_bytes > 0) == (number < 2)
        with streamer.batch(pieces):
            streamer.take()
        assert device.transfers.in_flight_bytes == 0, "what nobody takes is given up"
        streamer.close()
        threads.close()
