"""Sizes in bytes and times in seconds, as people write and read them: the one file that knows 1000 from 1024."""

import math
import re
from decimal import Decimal

from lowmem_pnn.errors import UnitError

MEBIBYTE, MEGABYTE = 1 << 20, 10**6

_FACTORS = {
    "": 1, "b": 1,
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
# Below what the operating system's own limits can express, and above all machines.
_LARGEST = 2**60
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*", re.ASCII)


def parse_bytes(text: str | int) -> int:
    """Read a size as people write it.

    Args:
        text: a number with B, k, kB, M, MB, G, GB, T, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024), in any case; a bare
            number is bytes.

    Returns:
        The size in bytes, rounded down.

    Raises:
        UnitError: no such unit, or the size is less than one byte or more than 2**60.

    Example:
        >>> parse_bytes("2GB"), parse_bytes("1.5 MiB"), parse_bytes("100M"), parse_bytes(4096)
        (2000000000, 1572864, 100000000, 4096)
    """
    match = _SIZE.fullmatch(str(text))
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise UnitError(f"{str(text)!r} is not a size; write 512MB or 512MiB")
    # Whole and fractional digits apart: a float would lose the last bytes of a large size.
    whole, _, fraction = match[1].partition(".")
    size: int = int(whole or 0) * factor + int(fraction or 0) * factor // 10 ** len(fraction)
    if size < 1:
        raise UnitError(f"{str(text)!r} is a size of 0 bytes; write a positive one, as 512MB or 512MiB")
    if size > _LARGEST:
        raise UnitError(f"{str(text)!r} is more than {_LARGEST} bytes, which no machine has; write one as 512MB or 512MiB")
    return size


_TIME = re.compile(
    r"\s*(?:(\d+(?:\.\d+)?)\s*d)?\s*(?:(\d+(?:\.\d+)?)\s*h)?\s*(?:(\d+(?:\.\d+)?)\s*m)?\s*(?:(\d+(?:\.\d+)?)\s*s)?\s*", re.ASCII
)


def parse_seconds(text: str) -> float:
    """Read a time as people write it.

    Args:
        text: days, hours, minutes and seconds, each a number with d, h, m or s, in this order.

    Returns:
        The time in seconds.

    Raises:
        UnitError: no such unit, a bare number, or no time at all.

    Example:
        >>> parse_seconds("90m"), parse_seconds("1h30m"), parse_seconds("45 s")
        (5400.0, 5400.0, 45.0)
    """
    match = _TIME.fullmatch(text)
    seconds = (
        sum(float(part or 0) * unit for part, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True)) if match else 0.0
    )
    if seconds <= 0:
        raise UnitError(f"{text!r} is not a time; write 90m, 1h30m or 45s")
    return seconds


def exact_seconds(seconds: float) -> str:
    """Write a time so that `parse_seconds` reads the same.

    Args:
        seconds: above 0.

    Example:
        >>> exact_seconds(5400.0), exact_seconds(0.25), exact_seconds(1e-7)
        ('5400s', '0.25s', '0.0000001s')
    """
    return f"{Decimal(repr(seconds).removesuffix('.0')):f}s"


def format_bytes(size: int | float) -> str:
    """Write a size for people, in powers of 1000 and three or four digits.

    Args:
        size: in bytes; may be negative.

    Returns:
        A text such as `256.0 MB`.

    Example:
        >>> format_bytes(2_160_000_000), format_bytes(1_500), format_bytes(12)
        ('2.16 GB', '1.5 kB', '12 B')
    """
    for unit, factor, digits in (("TB", 10**12, 2), ("GB", 10**9, 2), ("MB", 10**6, 1), ("kB", 10**3, 1)):
        # The rounding decides the unit, so that 999,960 bytes are '1.0 MB' and not '1000.0 kB'.
        if abs(size) >= factor - factor // 2000:
            return f"{size / factor:.{digits}f} {unit}"
    return f"{int(size)} B"


def exact_size(size: int) -> str:
    """Write a size so that `parse_bytes` reads the same: in the largest unit in which it is a whole number.

    Example:
        >>> exact_size(2_000_000_000), exact_size(1_500_000), exact_size(1 << 30), exact_size(1025)
        ('2GB', '1500kB', '1GiB', '1025')
    """
    units = (
        ("TiB", 2**40),
        ("TB", 10**12),
        ("GiB", 2**30),
        ("GB", 10**9),
        ("MiB", 2**20),
        ("MB", 10**6),
        ("KiB", 2**10),
        ("kB", 10**3),
    )
    return next((f"{size // factor}{unit}" for unit, factor in units if size % factor == 0), str(size))


def seconds_text(seconds: float) -> str:
    """Seconds as tables of forecasts have them.

    Example:
        >>> seconds_text(0.0123), seconds_text(12.34), seconds_text(7200)
        ('0.012', '12.3', '7200')
    """
    digits = max(0, 2 - math.floor(math.log10(seconds))) if seconds >= 1 else 3
    return f"{seconds:.{min(digits, 3)}f}" if seconds < 100 else f"{seconds:.0f}"


def clock_text(seconds: float) -> str:
    """Seconds that are to come, or have gone by, as a clock shows them.

    Example:
        >>> clock_text(0.4), clock_text(250), clock_text(7265), clock_text(180_000)
        ('0:00', '4:10', '2:01:05', '2 d 2 h')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
