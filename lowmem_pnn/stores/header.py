"""Header of a safetensors file: laid out for writing, parsed and checked after reading; no file is touched.

The format (https://huggingface.co/docs/safetensors):

    | 8 bytes: N, little-endian | N bytes: header, JSON in UTF-8 | data section |

The header starts with `{` and may end in spaces. It maps each tensor's name to
`{"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}`, with offsets counted from the start of the data section;
`"__metadata__"`, if there, maps texts to texts. Elements are little-endian and row-major. The tensors cover the data section
exactly: no gap, no overlap, no byte after the last.

Headers laid out here go further where the format lets them: the data section starts at a multiple of 4096 bytes, and the tensors
are in an order such that each whose size is a multiple of 4096, or of 64, starts at one too, and every other at least at a multiple
of its element's size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowmem_pnn.memory.aligned import PAGE_BYTES
from lowmem_pnn.units import MEBIBYTE

MAX_HEADER_BYTES = 16 * MEBIBYTE
"""A larger header is refused: 67 MB of JSON that describe empty tensors take 1.7 GB to parse."""

_FORMAT_NAMES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32", "uint32": "U32", "int64": "I64",
    "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
# The last of these is missing from older PyTorch releases.
DTYPE_BY_NAME: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for torch_name, name in _FORMAT_NAMES.items() if hasattr(torch, torch_name)
}
"""Every element type that can be stored, by the format's name for it."""
NAME_BY_DTYPE: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPE_BY_NAME.items()}
"""The format's names, by element type."""

TensorLayout = tuple[torch.dtype, tuple[int, ...]]
"""Element type and shape of a tensor."""


class HeaderFault(ValueError):
    """Fault of a header, worded to follow the file's name; the file's reader turns it into an error for the user."""


@dataclass(frozen=True)
class TensorEntry:
    """Entry of a header: where a tensor is in its file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


def lay_out(
    tensors: Mapping[str, TensorLayout], metadata: Mapping[str, str], keep_order: bool = False
) -> tuple[bytes, dict[str, TensorEntry]]:
    """Lay out the tensors of a new file, and write the header that says so.

    Args:
        tensors: Element type and shape by name; the header lists the tensors in this order.
        metadata: Texts for the header.
        keep_order: Whether the bytes are in this order too, unless a tensor would then start inside an element; the alignment is
            given up for it.

    Returns:
        The file's first bytes, up to its data section, and the tensors' entries by name.

    Raises:
        HeaderFault: The header would be above `MAX_HEADER_BYTES`.

    Example:
        >>> first, entries = lay_out({"bias": (torch.float32, (3,)), "weight": (torch.float32, (16, 3))}, {})
        >>> entries["weight"].offset % 64, entries["bias"].offset - entries["weight"].offset
        (0, 192)
    """
    assert "__metadata__" not in tensors, "the format keeps this name for itself"
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    order = list(tensors)
    if not (keep_order and _starts_at_elements(tensors, sizes)):
        # By the largest power of two, up to a page, that divides the size: all sizes before a tensor are then multiples of its own.
        order.sort(key=lambda name: -min(sizes[name] & -sizes[name] or PAGE_BYTES, PAGE_BYTES))
    begins, end = {}, 0
    for name in order:
        begins[name] = end
        end += sizes[name]
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, (dtype, shape) in tensors.items():
        header[name] = {
            "dtype": NAME_BY_DTYPE[dtype],
            "shape": list(shape),
            "data_offsets": [begins[name], begins[name] + sizes[name]],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        raise HeaderFault(f"would need a header of {len(text)} bytes, above the limit of {MAX_HEADER_BYTES}")
    start = 8 + len(text)
    entries = {
        name: TensorEntry(name, dtype, tuple(shape), start + begins[name], sizes[name])
        for name, (dtype, shape) in tensors.items()
    }
    return len(text).to_bytes(8, "little") + text, entries


def parse_header(text: bytes | bytearray, file_bytes: int) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Parse a header, and check it against the format and the file's size.

    Args:
        text: The header, without the 8 bytes of its length.
        file_bytes: Size of the file.

    Returns:
        The tensors' entries by name, in the header's order, and the metadata.

    Raises:
        HeaderFault: Anything is not as the format says.
    """
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise HeaderFault(f"has a header that cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(header, dict):
        raise HeaderFault("has a header that is no JSON object")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise HeaderFault("has '__metadata__' that does not map texts to texts")
    end = 8 + len(text)
    entries = {name: _parse_entry(name, value, end) for name, value in header.items()}
    for entry in sorted(entries.values(), key=lambda entry: (entry.offset, entry.nbytes)):
        if entry.offset != end:
            fault = "overlaps the tensor before it" if entry.offset < end else "leaves a gap after the tensor before it"
            raise HeaderFault(f"has tensor {entry.name!r} at byte {entry.offset}, which {fault}: that ends at byte {end}")
        end += entry.nbytes
    if end != file_bytes:
        raise HeaderFault(f"has {file_bytes} bytes, its header says {end}")
    return entries, metadata


def describe(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    """Return element type and shape as error messages say them.

    Example:
        >>> describe(torch.float32, (3, 4))
        'float32 (3, 4)'
    """
    return f"{str(dtype).removeprefix('torch.')} {shape}"


def _starts_at_elements(tensors: Mapping[str, TensorLayout], sizes: Mapping[str, int]) -> bool:
    begin = 0
    for name, (dtype, _) in tensors.items():
        if begin % dtype.itemsize:
            return False
        begin += sizes[name]
    return True


def _parse_entry(name: str, value: Any, data_start: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise HeaderFault(f"describes tensor {name!r} by something else than dtype, shape and data_offsets")
    dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPE_BY_NAME:
        raise HeaderFault(f"has tensor {name!r} of element type {dtype_name!r}, known are {', '.join(DTYPE_BY_NAME)}")
    if not (_is_naturals(shape) and _is_naturals(offsets) and len(offsets) == 2):
        raise HeaderFault(f"has tensor {name!r} of shape {shape!r} at offsets {offsets!r}")
    dtype = DTYPE_BY_NAME[dtype_name]
    nbytes = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise HeaderFault(f"has tensor {name!r} of {nbytes} bytes at offsets {offsets!r}")
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], nbytes)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} is there twice")
        result[name] = value
    return result


def _is_naturals(value: Any) -> bool:
    # The bound is PyTorch's on a dimension; a bool is an int to Python.
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)
