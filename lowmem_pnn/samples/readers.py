"""Readers: processes of the host that read, decode and augment samples for the trainer, in an order that no number of them changes."""

import io
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.samples.augment import AugmentationKey
from lowmem_pnn.samples.reader_process import (
    READER_VARIABLE,
    Message,
    SplitPickler,
    receive_into,
    receive_message,
    send_message,
)
from lowmem_pnn.sources.imports import imported_files, one_line
from lowmem_pnn.sources.splits import Indices, Split, as_indices
from lowmem_pnn.sources.subsets import labels_of

_GRACE_SECONDS = 5.0
# Seconds between two looks at the memory of the readers, which costs the system a walk through their pages.
_METER_SECONDS = 0.5
_PRIVATE = re.compile(rb"^(?:Pss_Anon|Pss_Shmem):\s+(\d+) kB", re.MULTILINE)
# Slow to import, and large: imported once, before the processes part, where the trainer has imported them.
_SHARED_MODULES = ("torchvision.transforms.v2", "PIL.Image")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Readers:
    """Processes that read samples; a batch is divided among them. Use it as a context.

    Args:
        splits: Splits by name, which are sent to the processes.
        number: Number of processes.
        name: Name of the data in messages.
    """

    def __init__(self, splits: Mapping[Any, Split], number: int, name: str) -> None:
        assert number > 0, "somebody reads"
        self.number = number
        self._splits, self._name = splits, name
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._pids: list[int] = []
        self._peak_bytes, self._metered = 0, 0.0

    def __enter__(self) -> "Readers":
        """Start the processes, and send them the splits.

        Raises:
            ConfigError: A split cannot be sent to another process.
        """
        buffers: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        try:
            SplitPickler(stream, protocol=5, buffer_callback=buffers.append).dump(dict(self._splits))
        # Whatever a user's data set raises is the user's to see, on one line, with the original as the cause.
        except Exception as error:
            raise ConfigError(
                f"--workers {self.number}: data {self._name} cannot be sent to another process: {one_line(error)}; define its class and "
                "functions at the top of a module, or leave --workers out"
            ) from error
        raw = [buffer.raw() for buffer in buffers]
        text = stream.getbuffer()
        preparation = pickle.dumps(
            {
                "path": sys.path,
                "files": imported_files(),
                "main": _main_module(),
                "modules": [name for name in _SHARED_MODULES if name in sys.modules],
                "text_bytes": len(text),
                "buffer_bytes": [len(part) for part in raw],
            }
        )
        self._start()
        try:
            first = self._sockets[0]
            part: Any
            for part in (len(preparation).to_bytes(8, "little"), preparation, text, *raw):
                first.sendall(part)
        except OSError as error:
            self.close()
            raise DataError(
                f"--workers {self.number}: the processes that read samples did not start ({one_line(error)})"
            ) from error
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes."""
        self.close()

    def _start(self) -> None:
        with ExitStack() as stack:
            pairs = [socket.socketpair() for _ in range(self.number)]
            self._sockets = [own for own, _ in pairs]
            theirs = [stack.enter_context(other) for _, other in pairs]
            root = str(Path(__file__).parents[2])
            code = f"import sys; sys.path.insert(0, {root!r}); from lowmem_pnn.samples.reader_process import main; main()"
            numbers = [str(other.fileno()) for other in theirs]
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(os.getpid()), *numbers],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a data set prints is no result
                pass_fds=[other.fileno() for other in theirs],
                start_new_session=True,  # a terminal's Ctrl-C is for the trainer
                env={**os.environ, READER_VARIABLE: "1", **dict.fromkeys(_THREADS, "1")},
            )

    def serve(self) -> dict[Any, "ServedSplit"]:
        """Return the splits, read by the processes."""
        return {name: ServedSplit(self, name, split) for name, split in self._splits.items()}

    def read(self, name: str, floats: bool, numbers: Any, key: AugmentationKey | None) -> Any:
        """Read samples, a share of them in each process.

        Args:
            name: Name of the split.
            floats: Whether its integers are numbers, and no tokens.
            numbers: Numbers of the samples, (B,).
            key: Word and number that name an epoch, or a view, for samples that are augmented.

        Returns:
            What the split's `batch` returns for all of them.

        Raises:
            LowMemError: What the split raises; or a process died.
        """
        shares = [share for share in np.array_split(numbers, self.number) if len(share)]
        with self._lock:
            self._wait_until_ready()
            used = self._sockets[: len(shares)]
            try:
                for connection, share in zip(used, shares, strict=True):
                    send_message(connection, (name, floats, share, key))
                batch = self._receive(used, list(map(len, shares)))
            except (EOFError, OSError) as error:
                raise self._died() from error
            self._meter()
        return batch

    def _receive(self, used: list[socket.socket], counts: list[int]) -> Any:
        """Receive what each process has read, straight into its place in the batch."""
        first: Message | None = None
        wholes: list[Tensor] = []
        fault: Exception | None = None
        row = 0
        for connection, count in zip(used, counts, strict=True):
            message = receive_message(connection)
            error, _ = message.value()
            if error is not None:
                fault = fault or error[0](error[1])
            elif first is None:
                first = message
                wholes = [torch.empty(sum(counts), *shape[1:], dtype=dtype) for shape, dtype in message.forms]
            for number, (shape, dtype) in enumerate(message.forms):
                receive_into(connection, torch.empty(shape, dtype=dtype) if fault else wholes[number][row : row + count])
            row += count
        if fault is not None:
            raise fault
        assert first is not None, "somebody has read something"
        return first.value(wholes)[1]

    def _wait_until_ready(self) -> None:
        """Wait until every process has the splits; the first time only."""
        while len(self._pids) < self.number:
            try:
                pid, fault = receive_message(self._sockets[len(self._pids)]).value()
            except (EOFError, OSError) as error:
                raise self._died() from error
            if fault is not None:
                raise ConfigError(
                    f"--workers {self.number}: data {self._name} cannot be opened in another process: {fault}; define its class and functions "
                    "in a module that can be imported, or leave --workers out"
                )
            self._pids.append(pid)

    def _died(self) -> DataError:
        """Return what is said of a process that is gone."""
        how = ""
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(0.2) if self._process is not None else 0
            how = f" of {signal.Signals(-code).name}" if code < 0 else ""
        return DataError(
            f"a process that reads samples of data {self._name} died{how}; give fewer --workers where host memory ran out, or none, to see "
            "where it fails"
        )

    @property
    def peak_bytes(self) -> int:
        """The most private memory that all of them had together, of all times at which it was looked at."""
        self._meter(now=not self._peak_bytes)
        return self._peak_bytes

    def _meter(self, now: bool = False) -> None:
        moment = time.monotonic()
        if not now and moment - self._metered < _METER_SECONDS:
            return
        self._metered, total = moment, 0
        for pid in list(self._pids):
            with suppress(OSError):
                # What they share is counted once: each has its share of it.
                total += sum(int(size) for size in _PRIVATE.findall(Path(f"/proc/{pid}/smaps_rollup").read_bytes())) * 1024
        self._peak_bytes = max(self._peak_bytes, total)

    def close(self) -> None:
        """End the processes, which see that their sockets are closed."""
        for connection in self._sockets:
            connection.close()
        self._sockets = []
        if self._process is not None:
            try:
                self._process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        self._pids = []


class ServedSplit:
    """Split whose samples are read by other processes.

    Args:
        readers: The processes.
        name: Name of the split among theirs.
        split: The split itself, of which only its length is asked here.
        floats: Whether its integers are numbers, and no tokens.
    """

    def __init__(self, readers: Readers, name: str, split: Split, floats: bool = False) -> None:
        self.readers = readers
        self.base, self._name, self._floats = split, name, floats

    def __len__(self) -> int:
        return len(self.base)

    def batch(self, indices: Indices, key: AugmentationKey | None = None) -> Any:
        """Return samples and labels, as `Split.batch` does."""
        return self.readers.read(self._name, self._floats, as_indices(indices, len(self)), key)

    def labels(self, numbers: npt.NDArray[np.int64]) -> Tensor:
        """Return targets (B, ...) alone, of samples by their numbers."""
        return labels_of(self.base, numbers)

    def as_floats(self) -> "ServedSplit":
        """Return the same split with integer samples as float32."""
        return ServedSplit(self.readers, self._name, self.base, floats=True)


def _main_module() -> dict[str, str] | None:
    """Return how the user's script is imported again, where a data set is defined in it; None where there is none."""
    main = sys.modules["__main__"]
    if (spec := getattr(main, "__spec__", None)) is not None:
        return {"init_main_from_name": spec.name}
    path = getattr(main, "__file__", None)
    return None if path is None else {"init_main_from_path": str(Path(path).absolute())}
