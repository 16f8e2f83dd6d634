"""Image files: their headers, damage that is found before training, and the pixels of every mode."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.image_file import FIRST_FRAME, TRANSPARENCY, TURNED, UPPER_BITS, decode, read_header


def noise(shape: tuple[int, ...], most: int = 256, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.RandomState(0).randint(0, most, shape).astype(dtype)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


# Modes.

WIDE = noise((6, 5), 65536, np.uint16)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_kept(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / name, Image.fromarray(WIDE))
    assert read_header(path).bits == 16
    grey = (WIDE / 65535).astype(np.float32)
    found = decode(path, deep=True)
    assert found.dtype == np.float32
    assert np.array_equal(found, np.stack([grey] * 3, axis=2))
    assert np.array_equal(decode(path, deep=False)[..., 1], np.rint(WIDE / 257).astype(np.uint8))


def test_sixteen_bits_of_the_other_byte_order(tmp_path: Path) -> None:
    image = Image.frombytes("I;16B", (5, 6), WIDE.astype(">u2").tobytes())
    found = decode(saved(tmp_path / "a.tif", image), deep=True)
    assert np.array_equal(found[..., 0], (WIDE / 65535).astype(np.float32))


def test_a_grey_map_of_twelve_bits_in_sixteen_is_scaled_by_its_own_white(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 2 1 4095\n" + np.array([4095, 0], dtype=">u2").tobytes())
    assert decode(tmp_path / "a.pgm", deep=True)[..., 0].tolist() == [[1, 0]]


def test_a_tiff_in_which_zero_is_white(tmp_path: Path) -> None:
    saved(tmp_path / "a.tif", Image.fromarray(WIDE), tiffinfo={262: 0})
    assert np.array_equal(
        decode(tmp_path / "a.tif", deep=True)[..., 0], ((65535 - WIDE.astype(float)) / 65535).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("mode", "name", "shown"),
    [
        ("1", "a.png", lambda image: image.convert("RGB")),
        ("L", "a.png", lambda image: image.convert("RGB")),
        ("P", "a.png", lambda image: image.convert("RGB")),
        ("P", "a.gif", lambda image: image.convert("RGB")),
        ("LA", "a.png", lambda image: image.getchannel(0).convert("RGB")),
        ("RGBA", "a.png", lambda image: Image.merge("RGB", image.split()[:3])),
        ("RGB", "a.bmp", lambda image: image),
        ("RGB", "a.ppm", lambda image: image),
        ("RGB", "a.webp", lambda image: image),
        ("CMYK", "a.tif", lambda image: image.convert("RGB")),
        ("YCbCr", "a.tif", lambda image: image.convert("RGB")),
        ("LAB", "a.tif", lambda image: image.convert("RGB")),
    ],
)
def test_modes_of_eight_bits_are_shown_as_they_look(
    mode: str, name: str, shown: Callable[[Image.Image], Image.Image], tmp_path: Path
) -> None:
    colours = Image.fromarray(noise((6, 5, 4)), "RGBA")
    image = colours.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else colours.convert(mode)
    path = saved(tmp_path / name, image, **({"lossless": True} if name.endswith("webp") else {}))
    header = read_header(path)
    assert (header.width, header.height, header.bits) == (5, 6, 8)
    assert header.remarks == ({TRANSPARENCY} if mode in ("LA", "RGBA") else set())
    expected = np.array(shown(image))
    assert np.array_equal(decode(path, deep=False), expected)
    assert np.array_equal(decode(path, deep=True), expected.astype(np.float32) / np.float32(255))


def test_an_inverted_cmyk_jpeg_is_not_shown_as_its_negative(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.JPEG", Image.new("RGB", (16, 16), (250, 20, 30)).convert("CMYK"))
    assert np.abs(decode(path, deep=False).astype(int) - np.array([250, 20, 30])).max() < 12


@pytest.mark.filterwarnings("error")
def test_a_palette_with_transparency_warns_of_nothing(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2))
    image.putpalette([255, 0, 0, 0, 255, 0])
    path = saved(tmp_path / "a.png", image, transparency=b"\x00\x80")
    assert decode(path, deep=False).tolist() == [[[255, 0, 0]] * 2] * 2
    assert read_header(path).remarks == {TRANSPARENCY}


@pytest.mark.parametrize(
    ("image", "name", "words"),
    [
        (Image.fromarray(noise((4, 4), 2**20, np.int32)), "a.tif", r"is of mode I \(whole numbers of 32 bits"),
        (Image.fromarray(np.random.rand(4, 4).astype(np.float32)), "a.tif", r"is of mode F \(floating-point numbers\)"),
    ],
)
def test_a_scale_that_is_not_known_is_refused(image: Image.Image, name: str, words: str, tmp_path: Path) -> None:
    path = saved(tmp_path / name, image)
    for look in (lambda: read_header(path), lambda: decode(path, deep=True)):
        with pytest.raises(DataError, match=rf"a.tif {words}.*; store 8 or 16 bits per value, or give arrays: npz:FILE"):
            look()


def test_the_upper_bits_of_deep_colour_are_said(tmp_path: Path) -> None:
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")

    row = np.array([0x1234, 0x80FF, 0xFF00], dtype=">u2").tobytes()
    header = (1).to_bytes(4, "big") * 2 + bytes([16, 2, 0, 0, 0])
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert read_header(tmp_path / "a.png").remarks == {UPPER_BITS}
    assert decode(tmp_path / "a.png", deep=False).tolist() == [[[0x12, 0x80, 0xFF]]]


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.webp", "a.png"])
def test_of_several_frames_the_first_is_taken(name: str, tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    path = saved(tmp_path / name, first, save_all=True, append_images=[second])
    assert read_header(path).remarks == {FIRST_FRAME}
    assert np.abs(decode(path, deep=False).astype(int) - [255, 0, 0]).max() < 3


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_data_say(orientation: int, name: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(noise((6, 5, 3)).repeat(4, 0).repeat(4, 1))
    path = saved(tmp_path / name, image, exif=exif, **({"quality": 95} if name == "a.jpg" else {}))
    with Image.open(path) as opened:
        expected = np.array(ImageOps.exif_transpose(opened).convert("RGB"))
    found = decode(path, deep=False)
    assert np.array_equal(found, expected)
    header = read_header(path)
    assert (header.height, header.width) == expected.shape[:2]
    assert header.remarks == ({TURNED} if orientation > 1 else set())


# Damage.


def contents(form: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(noise((40, 50, 3))).save(stream, form)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP"])
def test_a_file_that_is_cut_is_found_by_its_header(form: str, tmp_path: Path) -> None:
    whole, path = contents(form), tmp_path / "a.img"
    path.write_bytes(whole)
    header = read_header(path)
    assert (header.width, header.height) == (50, 40)
    for length in (0, 3, 12, len(whole) // 2, len(whole) - 40):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"a.img cannot be read as an image \([^<>]+\); repair or remove it$"):
            read_header(path)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP"])
def test_a_file_with_something_behind_its_end_is_whole(form: str, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(contents(form) + b"\0" * 9000)
    assert read_header(path).width == 50


@pytest.mark.parametrize("form", ["PNG", "JPEG", "BMP", "GIF", "TIFF"])
def test_headers_alone_are_read(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(contents(form))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert read_header(path).height == 40


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "round.png").symlink_to(tmp_path / "round.png")
    for name, words in (
        ("pipe", "is no regular file; remove it"),
        ("nowhere", r"cannot be read as an image \(a link that leads nowhere\); repair or remove it"),
        ("none", r"cannot be read as an image \(there is no such file\)"),
        ("round", r"cannot be read as an image \(.*symbolic links.*\)"),
    ):
        with pytest.raises(DataError, match=rf"{name}.png {words}"):
            read_header(tmp_path / f"{name}.png")


def refusal(look: Callable[[], Any]) -> str | None:
    """The text with which a file is refused; None where it is taken."""
    try:
        look()
    except DataError as error:
        return str(error)
    return None


def test_what_is_no_image_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("<html>404</html>")
    assert refusal(lambda: read_header(tmp_path / "a.png")) == (
        f"{tmp_path}/a.png cannot be read as an image (its header is of no known format); repair or remove it"
    )


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "PPM", "TIFF", "WEBP"])
def test_nonsense_is_an_error_that_names_the_file(form: str, tmp_path: Path) -> None:
    whole, path, random = bytearray(contents(form)), tmp_path / "a.img", np.random.RandomState(1)
    for _ in range(60):
        broken = bytearray(whole)
        for place in random.randint(2, min(len(whole), 200), 4):
            broken[place] = random.randint(256)
        path.write_bytes(broken)
        for look in (lambda: read_header(path), lambda: decode(path, deep=False)):
            text = refusal(look)
            assert text is None or ("a.img" in text and "\n" not in text)


def test_a_header_that_asks_for_all_memory_is_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    path = tmp_path / "a.png"
    path.write_bytes(contents("PNG")[:-12])  # without its end it is decoded
    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    assert refusal(lambda: read_header(path)) == (
        f"{path} cannot be read as an image (it says of itself that it needs more memory than there is); repair or remove it"
    )
    with pytest.raises(MemoryError):
        decode(path, deep=False)  # in training, where a smaller batch may do
