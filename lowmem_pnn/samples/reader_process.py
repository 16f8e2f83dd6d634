"""A process of the host that reads samples: started by the trainer, sent its splits, and told which samples to read.

    trainer --(preparation, pickle of the splits, their arrays)--> reader 0
                                                                     |-- fork --> reader 1 ...
    trainer --(split, numbers, key)--> each reader --(structure, then the bytes of its tensors)--> trainer

Readers are forked when torch is imported and arrays are received, which they share, and before anything of the user's runs: each has
its own files open. They end when the trainer's side of their socket is closed, and the kernel kills them when the trainer dies.
"""

import ctypes
import importlib
import io
import os
import pickle
import signal
import socket
import struct
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from lowmem_pnn.errors import DataError, LowMemError
from lowmem_pnn.sources.arrays import as_tensor
from lowmem_pnn.sources.imports import import_again, one_line
from lowmem_pnn.sources.npz_file import MappedMember, mapped_member
from lowmem_pnn.sources.subsets import as_floats

READER_VARIABLE = "LOWMEM_PNN_READER"
"""Set in the processes that read samples."""

_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("<Q")


# Messages: the length of a pickle, the pickle, and the bytes of what it stands for.


def send_message(connection: socket.socket, value: Any) -> None:
    """Send a value whose tensors are sent as their bytes, without a copy.

    Args:
        connection: Socket to the other side.
        value: What can be pickled; its tensors are on the CPU.
    """
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if type(obj) is not Tensor:
                return None
            tensors.append(obj.detach().contiguous())
            return len(tensors) - 1, tuple(obj.shape), obj.dtype

    stream = io.BytesIO()
    Pickler(stream, protocol=5).dump(value)
    connection.sendall(_LENGTH.pack(stream.tell()))
    connection.sendall(stream.getbuffer())
    for tensor in tensors:
        if tensor.numel():
            connection.sendall(_bytes_of(tensor))


def receive_message(connection: socket.socket) -> "Message":
    """Receive the structure of a value, whose tensors come next.

    Args:
        connection: Socket to the other side.

    Raises:
        EOFError: The other side is gone.
    """
    return Message(_receive(connection, _LENGTH.unpack(_receive(connection, _LENGTH.size))[0]))


class Message:
    """The structure of a value that is received.

    Args:
        text: Its pickle.
    """

    def __init__(self, text: bytes) -> None:
        self._text = text
        self.forms: list[tuple[tuple[int, ...], torch.dtype]] = []
        """Shape and dtype of each of its tensors, in the order in which they come."""
        self._load(lambda _, shape, dtype: self.forms.append((shape, dtype)))

    def value(self, tensors: Sequence[Tensor] = ()) -> Any:
        """Return the value.

        Args:
            tensors: Its tensors, which take their places in it; without them None is there.
        """
        return self._load(lambda number, *_: tensors[number] if tensors else None)

    def _load(self, tensor_of: Callable[[int, tuple[int, ...], torch.dtype], Any]) -> Any:
        class Unpickler(pickle.Unpickler):
            def persistent_load(self, pid: Any) -> Any:
                return tensor_of(*pid)

        return Unpickler(io.BytesIO(self._text)).load()


def receive_into(connection: socket.socket, tensor: Tensor) -> None:
    """Receive the bytes of a tensor.

    Args:
        connection: Socket to the other side.
        tensor: Contiguous tensor on the CPU, which gets them.

    Raises:
        EOFError: The other side is gone.
    """
    if tensor.numel():
        _receive_into(connection, _bytes_of(tensor))


def _bytes_of(tensor: Tensor) -> memoryview:
    view: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(view)


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    _receive_into(connection, memoryview(data))
    return bytes(data)


def _receive_into(connection: socket.socket, view: memoryview) -> None:
    while len(view):
        count = connection.recv_into(view)
        if not count:
            raise EOFError("the other side is gone")
        view = view[count:]


# Splits, on their way to the readers.


class SplitPickler(pickle.Pickler):
    """Pickles splits, with what their tensors and arrays hold set apart, so that nothing is copied."""

    def reducer_override(self, obj: Any) -> Any:
        """Have tensors on the CPU pickled as arrays, whose memory protocol 5 sets apart."""
        if type(obj) is Tensor and obj.device.type == "cpu" and obj.layout == torch.strided and not obj.requires_grad:
            if (member := mapped_member(obj)) is not None:
                return _mapped_tensor, (member,)
            dense = obj.contiguous()
            return _tensor, (dense.reshape(-1).view(torch.uint8).numpy(), dense.dtype, tuple(dense.shape))
        return NotImplemented


def _mapped_tensor(member: MappedMember) -> Tensor:
    return as_tensor(member.array, "a mapped file")


def _tensor(array: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    with warnings.catch_warnings():
        # Nothing here writes to a data set.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).view(dtype).reshape(shape)


class _SplitUnpickler(pickle.Unpickler):
    """Unpickles splits, after an import of what the trainer has imported from files."""

    def __init__(self, stream: io.BytesIO, buffers: Sequence[memoryview], preparation: Mapping[str, Any]) -> None:
        super().__init__(stream, buffers=buffers)
        self._preparation = preparation

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name == "__main__":
            self._import_main()
        elif (path := self._preparation["files"].get(module_name)) is not None:
            import_again(module_name, Path(path))
        return super().find_class(module_name, global_name)

    def _import_main(self) -> None:
        """Import the user's script as multiprocessing does: under another name, so that only what it defines is there."""
        from multiprocessing import spawn

        main = self._preparation["main"]
        if main and sys.modules["__main__"].__spec__ is None and not hasattr(sys.modules["__main__"], "__file__"):
            spawn.prepare(main)


def main() -> NoReturn:
    """Read samples until the trainer is gone; the arguments are its process number, and the sockets of the readers."""
    trainer, *descriptors = map(int, sys.argv[1:])
    _die_with(trainer)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    try:
        preparation = pickle.loads(_receive(sockets[0], _LENGTH.unpack(_receive(sockets[0], _LENGTH.size))[0]))
        sys.path[:] = preparation["path"]
        text = _receive(sockets[0], preparation["text_bytes"])
        buffers = []
        for size in preparation["buffer_bytes"]:
            buffer = memoryview(np.empty(size, dtype=np.uint8))  # type: ignore[arg-type,unused-ignore]
            _receive_into(sockets[0], buffer)
            buffers.append(buffer)
    except (EOFError, OSError):
        os._exit(0)  # the trainer has given up
    for module in preparation["modules"]:
        # What is wrong with it is said when it is used.
        with suppress(Exception):
            importlib.import_module(module)
    own, first = 0, os.getpid()
    forked: list[int] = []
    for number in range(1, len(sockets)):
        pid = os.fork()
        if not pid:
            _die_with(first)
            own, forked = number, []
            break
        forked.append(pid)
    for number, other in enumerate(sockets):
        if number != own:
            other.close()
    with suppress(EOFError, OSError):
        _serve(sockets[own], lambda: _SplitUnpickler(io.BytesIO(text), buffers, preparation).load())
    # The others would die with this one, and be zombies where nobody takes care of orphans. SIGCHLD is not ignored instead: then the
    # exit codes of programs that a data set runs would be lost.
    for pid in forked:
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    # Without the user's exit handlers, which are the trainer's to run.
    os._exit(0)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux); end it if that has happened."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _serve(connection: socket.socket, load: Callable[[], Any]) -> None:
    """Answer requests, each with samples or with what is wrong, until the trainer is gone."""
    splits: Any = None
    forms: dict[tuple[str, bool], Any] = {}
    fault: str | None = None
    try:
        splits = load()
    # Whatever unpickling a user's data set raises is the user's to see, on one line.
    except BaseException as error:
        fault = str(error) if isinstance(error, LowMemError) else one_line(error)
    send_message(connection, (os.getpid(), fault))
    while True:
        name, floats, indices, key = receive_message(connection).value()
        answer: Any
        try:
            if (name, floats) not in forms:
                forms[name, floats] = as_floats(splits[name]) if floats else splits[name]
            split = forms[name, floats]
            answer = None, split.batch(indices) if key is None else split.batch(indices, key)
        except LowMemError as error:
            answer = (type(error), str(error)), None
        except MemoryError:
            answer = (DataError, "memory ran out in a process that reads samples; give fewer --workers"), None
        # As above.
        except BaseException as error:
            answer = (DataError, f"samples cannot be read: {one_line(error)}; see to the data set"), None
        send_message(connection, answer)
