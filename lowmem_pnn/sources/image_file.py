"""One image file: its header, looked at before training, and its pixels as a model is shown them."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lowmem_pnn.errors import DataError, LowMemError
from lowmem_pnn.sources.imports import one_line

# Modes of Pillow with 8 bits a value or fewer, which its own conversion to RGB scales rightly.
_MODES_8 = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"})
_MODES_16 = frozenset({"I;16", "I;16B", "I;16L", "I;16N"})
_EXIF_ORIENTATION = 0x0112
# Tags of a TIFF: offsets and lengths of its strips, and of its tiles.
_TIFF_PIECES = ((273, 279), (324, 325))
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_WHITE_IS_ZERO = 258, 262, 0
# A JPEG may have a few bytes behind its end.
_TAIL_BYTES = 4096

TRANSPARENCY = "transparency left out"
UPPER_BITS = "upper 8 of 16 bits of colour images"
TURNED = "turned as their EXIF data say"
FIRST_FRAME = "first frame of several"
REMARKS = (TRANSPARENCY, UPPER_BITS, TURNED, FIRST_FRAME)
"""What may be done to a file's pixels besides decoding, in words, in the order in which they are said."""
# Measured on images of 6 million pixels: Pillow's image, the array made of it, and its resized rows; 12.6 of a PNG, 16.8 of a JPEG, and
# 28.9 of either as float32.
_DECODING_BYTES, _DEEP_BYTES = 18, 30


@dataclass(frozen=True)
class ImageHeader:
    """What a file says of its image before its pixels are decoded.

    Args:
        width: Columns of the image as it is shown.
        height: Rows of the image as it is shown.
        bits: Bits of a value that are kept: 8, or 12 or 16.
        remarks: What of `REMARKS` is done to it.
    """

    width: int
    height: int
    bits: int
    remarks: frozenset[str]


def read_header(path: Path) -> ImageHeader:
    """Read the header of an image file, and see that its end is there.

    Only a file whose end is not where its header says is decoded: a cut file is told from one that merely ends oddly.

    Args:
        path: Path of the file.

    Raises:
        DataError: It is no image that can be decoded, or the scale of its values is not known.
    """
    try:
        return _read_header(path)
    except MemoryError as error:  # before training, where no smaller batch would help
        raise DataError(
            f"{path} cannot be read as an image (it says of itself that it needs more memory than there is); repair or remove it"
        ) from error


def _read_header(path: Path) -> ImageHeader:
    with _opened(path) as (image, stream):
        bits, orientation = _bits(image, path), _orientation(image)
        remarks = {
            TRANSPARENCY: image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info,
            UPPER_BITS: bits == 8 and _stored_bits(image, stream) == 16,
            TURNED: orientation != 1,
            FIRST_FRAME: _has_several_frames(image),
        }
        width, height = image.size
        sideways = orientation >= 5
        if sideways and image.format != "TIFF":
            width, height = height, width
        is_whole = _ends_where_it_should(image, stream)
    # Versions of Pillow differ in what they call the size of a TIFF on its side.
    if not is_whole or (sideways and image.format == "TIFF"):
        height, width = decode(path, deep=False).shape[:2]
    return ImageHeader(width, height, bits, frozenset(remark for remark, holds in remarks.items() if holds))


def decode(path: Path, deep: bool) -> npt.NDArray[np.uint8] | npt.NDArray[np.float32]:
    """Read the first frame of an image as RGB, upright.

    Args:
        path: Path of the file.
        deep: Whether to return float32 from 0 to 1, which keeps all bits of grey images of 12 or 16 bits.

    Returns:
        Pixels (height, width, 3), uint8 or float32.

    Raises:
        DataError: The file is damaged, or the scale of its values is not known.
    """
    with _opened(path) as (image, _):
        return as_rgb(image, path, deep)


def as_rgb(image: Any, where: Path | str, deep: bool | None = None) -> npt.NDArray[np.uint8] | npt.NDArray[np.float32]:
    """Return an image as RGB, upright.

    Args:
        image: Image of Pillow, which need not be decoded yet.
        where: Name of the image in messages.
        deep: As for `decode`; None for float32 where the image has more than 8 bits a value.

    Returns:
        Pixels (height, width, 3), uint8 or float32.

    Raises:
        DataError: The scale of its values is not known.
    """
    bits, is_negative = _bits(image, where), _is_negative(image)
    deep = bits > 8 if deep is None else deep
    image.load()
    pixels: Any
    if bits == 8:
        # Pillow converts a palette with transparency to RGB with a warning, and to RGBA without one.
        whole = image.convert("RGBA") if image.mode in ("P", "PA") else image
        pixels = np.array(whole.convert("RGB"))
        if deep:
            pixels = pixels.astype(np.float32) / np.float32(255)
    else:
        most = 2**bits - 1
        grey = np.asarray(image).astype(np.float64)
        grey = (most - grey if is_negative else grey) / most
        grey = grey.astype(np.float32) if deep else np.rint(grey * 255).astype(np.uint8)
        pixels = np.repeat(grey[:, :, None], 3, axis=2)
    return np.ascontiguousarray(_upright(pixels, _orientation(image)))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, BinaryIO]]:
    """Open an image, and the file that it is in; whatever Pillow raises for a damaged file becomes an error that names it."""
    from PIL import Image

    try:
        # A pipe would be waited for.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is no regular file; remove it")
        if not status.st_size:
            raise DataError(f"{path} cannot be read as an image (the file is empty); repair or remove it")
        with path.open("rb") as stream, Image.open(stream) as image:
            yield image, stream
    except (LowMemError, MemoryError):
        raise
    # Pillow's readers raise nearly anything for nonsense: OSError, SyntaxError, struct.error, TypeError, and others of their own.
    except Exception as error:
        raise DataError(f"{path} cannot be read as an image ({_reason(error, path)}); repair or remove it") from error


def _reason(error: Exception, path: Path) -> str:
    """Return in words why an image cannot be read."""
    from PIL import UnidentifiedImageError

    if isinstance(error, FileNotFoundError):
        return "a link that leads nowhere" if path.is_symlink() else "there is no such file"
    if isinstance(error, UnidentifiedImageError):
        return "its header is of no known format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error) if isinstance(error, OSError | ValueError | SyntaxError) else one_line(error)
    return " ".join(text.split())[:200] or type(error).__name__


def _bits(image: Any, where: Path | str) -> int:
    """Return the bits of a value that are kept: Pillow clips or wraps what has more than 8 when it is converted to RGB."""
    if image.mode in _MODES_8:
        return 8
    if image.mode in _MODES_16:
        return _tiff_bits(image) if image.format == "TIFF" else 16
    # Pillow has 16 bits of these formats in 32, and brings other greatest values to 65535.
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 16
    kind = {"I": "whole numbers of 32 bits, or with a sign", "F": "floating-point numbers"}.get(image.mode, "not known here")
    raise DataError(
        f"{where} is of mode {image.mode} ({kind}), and which value is white is not said; store 8 or 16 bits per value, or give "
        "arrays: npz:FILE"
    )


def _tiff_bits(image: Any) -> int:
    return int(max(image.tag_v2.get(_TIFF_BITS, (8,))))


def _stored_bits(image: Any, stream: BinaryIO) -> int:
    """Return the bits of a value in the file, as far as it is a PNG or a TIFF."""
    if image.format == "TIFF":
        return _tiff_bits(image)
    if image.format == "PNG":
        stream.seek(24)  # behind the signature (8), length and name of the first chunk (8), width and height (8)
        return stream.read(1)[0]
    return 8


def _is_negative(image: Any) -> bool:
    """Return whether 0 is white; of images of 8 bits Pillow knows that itself."""
    return bool(image.format == "TIFF" and image.tag_v2.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO)


def _orientation(image: Any) -> int:
    """Return the EXIF orientation, 1 to 8; 1 is upright. Pillow turns TIFFs by itself, and then says 1."""
    # Pillow decodes a whole PNG to look for EXIF data behind the pixels.
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        return 1
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    # Damaged EXIF data is no reason to lose an image.
    except Exception:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: npt.NDArray[Any], orientation: int) -> npt.NDArray[Any]:
    """Turn and mirror pixels (rows, columns, 3) as an EXIF orientation says (CIPA DC-008, section 4.6.5)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _has_several_frames(image: Any) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    # Only the first frame is used: what is wrong with the second does not matter.
    except Exception:
        return False


def _ends_where_it_should(image: Any, stream: BinaryIO) -> bool:
    """Return whether a file is as long as it says, without reading it; False where that is not known."""
    size = stream.seek(0, os.SEEK_END)
    if image.format == "PNG":
        return _has_png_end(stream, size)
    if image.format in ("JPEG", "MPO", "GIF"):
        stream.seek(max(0, size - _TAIL_BYTES))
        tail = stream.read()
        return tail.rstrip(b"\0").endswith(b";") if image.format == "GIF" else b"\xff\xd9" in tail
    if image.format in ("WEBP", "BMP"):
        begin, more = (4, 8) if image.format == "WEBP" else (2, 0)
        stream.seek(begin)
        return size >= int.from_bytes(stream.read(4), "little") + more
    if image.format == "TIFF":
        tags = image.tag_v2
        pieces = [(tags.get(first, ()), tags.get(length, ())) for first, length in _TIFF_PIECES]
        return any(firsts for firsts, _ in pieces) and all(
            len(firsts) == len(lengths) and all(begin + length <= size for begin, length in zip(firsts, lengths, strict=True))
            for firsts, lengths in pieces
        )
    if image.format == "PPM" and image.tile[0][0] in ("raw", "ppm"):
        _, (_, _, width, height), begin, args = image.tile[0]
        is_wide = image.mode == "I" or (not isinstance(args, str) and args[1] > 255)
        row = (width + 7) // 8 if image.mode == "1" else width * len(image.getbands()) * (2 if is_wide else 1)
        return bool(size >= begin + row * height)
    # A format that is rare enough to be decoded.
    return False


def _has_png_end(stream: BinaryIO, size: int) -> bool:
    """Return whether the chunks of a PNG lead to its last one, each of them read but for its length and name."""
    position = 8
    while position + 12 <= size:
        stream.seek(position)
        head = stream.read(8)
        if head[4:] == b"IEND":
            return True
        position += int.from_bytes(head[:4], "big") + 12
    return False


def decoding_bytes(headers: list[ImageHeader]) -> int:
    """Return the memory that decoding and resizing the largest of some images takes for a moment.

    Args:
        headers: Headers of the images.
    """
    per_pixel = _DEEP_BYTES if any(header.bits > 8 for header in headers) else _DECODING_BYTES
    return per_pixel * max(header.width * header.height for header in headers)


def words_of(headers: list[ImageHeader]) -> tuple[str, ...]:
    """Return the steps from files to values from 0 to 1, in words."""
    done = frozenset().union(*(header.remarks for header in headers))
    bits = sorted({header.bits for header in headers})
    scale = "uint8 / 255" if bits == [8] else ", ".join(f"{width}-bit values / {2**width - 1}" for width in bits)
    return ("decoded to RGB", *(remark for remark in REMARKS if remark in done), scale)
