"""NumPy archives: members that are stored as they are become maps of the file, so that they take no memory; others are read.

`numpy.savez` stores, `numpy.savez_compressed` compresses. A map's pages are the kernel's, and go when somebody needs them.
"""

import struct
import weakref
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lowmem_pnn.errors import DataError

# Smaller members are read: a map takes a descriptor.
_LEAST_MAPPED_BYTES = 1 << 20
_CHUNK_BYTES = 1 << 22
# A member's own header: its name and its extra field, of the lengths at 26 and 28, stand between these 30 bytes and the data.
_LOCAL_HEADER_BYTES = 30
_LENGTHS = struct.Struct("<HH")

# Address of each map, and what it is of.
_MAPS: dict[int, "MappedMember"] = {}


class MappedMember:
    """Member of an archive that is mapped into memory, and notices when its file is changed under the map.

    Args:
        path: Path of the archive.
        offset: Where the member's values begin.
        dtype: Element type.
        shape: Shape.
        fortran: Whether the first axis is the fastest.
        state: Size and time of change that the file had; None for those that it has.

    Raises:
        DataError: The file was changed.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        fortran: bool,
        state: tuple[int, int] | None = None,
    ) -> None:
        self._place = path, offset, dtype, shape, fortran
        self._path, self._state = path, state or _size_and_time(path)
        self.check()
        mapped = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape, order="F" if fortran else "C")
        self.array: npt.NDArray[Any] = mapped
        """The values, read-only."""
        address = mapped.__array_interface__["data"][0]
        _MAPS[address] = self._twin()
        weakref.finalize(mapped, _MAPS.pop, address, None)

    def _twin(self) -> "MappedMember":
        """Return what is known of the map, without the map, which would otherwise never end."""
        twin = object.__new__(MappedMember)
        twin._place, twin._path, twin._state = self._place, self._path, self._state
        return twin

    def check(self) -> None:
        """Raise if the file was written to: a read behind its end would kill the process, and other values are other data.

        Raises:
            DataError: The file was changed.
        """
        if (state := _size_and_time(self._path)) != self._state:
            raise DataError(
                f"{self._path} was changed while it is used: it had {self._state[0]:,} bytes, it has {state[0]:,} and another time of change; "
                "put it back and go on with --resume, or begin again with --overwrite"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Have another process map the file itself."""
        return MappedMember, (*self._place, self._state)


def mapped_member(tensor: Tensor) -> MappedMember | None:
    """Return what a tensor is a map of; None where it is in memory.

    Args:
        tensor: Tensor on the CPU, the whole of what it may be a map of.
    """
    found = _MAPS.get(tensor.data_ptr())
    return found if found is not None and tuple(tensor.shape) == found._place[3] else None


def read_members(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the arrays of an archive, mapped where that is possible.

    Args:
        path: Path of the archive.
        names: Names of the arrays that are wanted; others are there as None.

    Raises:
        OSError, ValueError, zipfile.BadZipFile, ...: The file is damaged, or holds no arrays of numbers.
    """
    # Opened here: numpy leaves the files that it opens open when they are damaged.
    with path.open("rb") as stream:
        file = np.load(stream, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{path} holds a single array; save x_train, y_train, x_test, y_test with numpy.savez")
        with file:
            arrays: dict[str, Any] = {}
            for name in file.files:
                arrays[name] = None if name not in names else _map(path, stream, file.zip, name)
                if name in names and arrays[name] is None:
                    arrays[name] = file[name]
            return arrays


def _map(path: Path, stream: Any, archive: Any, name: str) -> npt.NDArray[Any] | None:
    """Map a member; None where it is compressed, small, or of another kind."""
    try:
        info = archive.getinfo(f"{name}.npy")
    except KeyError:
        return None
    if info.compress_type != zipfile.ZIP_STORED or info.file_size < _LEAST_MAPPED_BYTES or info.flag_bits & 1:
        return None
    stream.seek(info.header_offset)
    name_bytes, extra_bytes = _LENGTHS.unpack_from(stream.read(_LOCAL_HEADER_BYTES), 26)
    begin = info.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    stream.seek(begin)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        return None
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    offset = stream.tell()
    if dtype.hasobject or not dtype.isnative or offset - begin + dtype.itemsize * int(np.prod(shape)) != info.file_size:
        return None
    # As reading it would.
    crc = 0
    stream.seek(begin)
    left = info.file_size
    while left and (chunk := stream.read(min(left, _CHUNK_BYTES))):
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    if left or crc != info.CRC:
        raise zipfile.BadZipFile(f"Bad CRC-32 for file {info.filename!r}")
    return MappedMember(path.absolute(), offset, dtype, shape, fortran).array


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
