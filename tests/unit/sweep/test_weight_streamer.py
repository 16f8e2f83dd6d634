"""The weight streamer of a sweep: when writing fails, every file is closed, and the failure that came first is heard of."""

from pathlib import Path

import pytest
import torch

from lowmem_pnn.device import SimulatedDevice
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.errors import DiskError
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.sweep.weight_streamer import WeightStreamer

KEYS = ("weight/a", "weight/b")


@pytest.mark.parametrize("other_failure", [False, True])
def test_a_write_that_fails_leaves_no_file_open_and_replaces_no_exception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_failure: bool
) -> None:
    store = WeightStore.create(tmp_path, [{key: (torch.float32, (4,))} for key in KEYS])
    with SimulatedDevice(1 << 30) as device:
        threads = WorkerThreads()
        streamer = WeightStreamer(store, device, threads, 1 << 20)
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
