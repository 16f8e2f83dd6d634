"""Sizes as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_pnn.errors import UnitError
from lowmem_pnn.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        (4096, 4096),
        ("2GB", 2_000_000_000),
        ("2gb", 2_000_000_000),
        ("2 GiB", 2**31),
        (" 512MiB ", 2**29),
        ("1.5kB", 1500),
        (".5MB", 500_000),
        ("1.TB", 10**12),
        ("100M", 100_000_000),
        ("0.1G", 100_000_000),
        ("2g", 2_000_000_000),
        ("1.5 GB", 1_500_000_000),
        ("64k", 64_000),
        ("0.9999B", None),
        ("1.000000001GB", 1_000_000_001),
        ("1EB", None),
        ("1048576TiB", 2**60),
    ],
)
def test_sizes(text: str | int, size: int | None) -> None:
    if size is None:
        with pytest.raises(UnitError):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-5", "-5MB", "512 megs", "1e9", "nan", "inf", "1 0MB", "1,5GB", "0x10", "٣MB", "2GBs", "1..5MB"]
)
def test_what_is_no_size_is_refused_with_one_that_is(text: str) -> None:
    with pytest.raises(UnitError) as error:
        parse_bytes(text)
    assert str(error.value) == f"{text!r} is not a size; write 512MB or 512MiB"


@pytest.mark.parametrize("text", ["0", "0GB", "0.0001kB"])
def test_zero_is_refused(text: str) -> None:
    with pytest.raises(UnitError, match="is a size of 0 bytes; write a positive one"):
        parse_bytes(text)


def test_more_than_any_machine_has_is_refused() -> None:
    with pytest.raises(UnitError, match="'9999999999GB' is more than 1152921504606846976 bytes, which no machine has"):
        parse_bytes("9999999999GB")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_449, "999.4 kB"),
        (999_960, "1.0 MB"),
        (256_000_000, "256.0 MB"),
        (2_160_000_000, "2.16 GB"),
        (1.5e12, "1.50 TB"),
        (-686_900, "-686.9 kB"),
    ],
)
def test_formatted(size: float, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(1, 2**60))
def test_what_is_formatted_is_read_back_to_its_digits(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.06)
