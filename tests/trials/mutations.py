"""Mutations: seeded damage to the bytes of a file, blind (bits, ranges, sizes) or with knowledge of its format (JSON, headers, pickles)."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What stands in the place of a number, a text or a part of a JSON file.
_VALUES: tuple[Any, ...] = (
    -1, 0, 1, 7, 2**31, 2**32 + 1, 2**63 - 1, 2**63, 2**200, -(2**63), 0.5, -0.0, 1e308, float("nan"), float("inf"), True, None, "",
    [], {}, "../../../victim", "/etc/passwd", "RUN/evil.py:build", "p000.g000000.safetensors", "\u0000", "x" * 5000, [[[[]]]], "float32",
)  # fmt: skip
_LENGTHS = (0, 1, 7, 8, 2**24, 2**24 + 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


class Canary:
    """Object whose pickle makes a file when it is read: code that somebody put into a file has run then.

    Args:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"open({self._path!r}, 'w').close()",))


class Mutator:
    """Damages contents; the same seed gives the same damage.

    Args:
        canary: Path of the file that appears when a pickle is read.
        others: Contents of other files, which may come in a file's place.
    """

    def __init__(self, canary: Path, others: list[bytes]) -> None:
        self._pickles = [pickle.dumps(Canary(canary)), b"\x93NUMPY" + pickle.dumps(Canary(canary)), *_archives(canary)]
        self._others = others

    def mutate(self, content: bytes, chance: random.Random) -> tuple[str, bytes]:
        """Return the name of a kind of damage, and the damaged content, which differs from the content."""
        while True:
            kind = chance.choice(_KINDS[_form(content)])
            damaged = kind(self, content, chance)
            if damaged is not None and damaged != content:
                return kind.__name__.strip("_"), damaged

    def _flip_a_bit(self, content: bytes, chance: random.Random) -> bytes | None:
        return _changed(content, chance, 1, lambda byte: byte ^ 1 << chance.randrange(8))

    def _flip_some_bits(self, content: bytes, chance: random.Random) -> bytes | None:
        return _changed(content, chance, chance.randint(2, 30), lambda byte: byte ^ 1 << chance.randrange(8))

    def _change_bytes(self, content: bytes, chance: random.Random) -> bytes | None:
        return _changed(
            content, chance, chance.randint(1, 8), lambda _: chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        )

    def _truncate(self, content: bytes, chance: random.Random) -> bytes:
        return content[: chance.choice((0, 1, 7, 8, len(content) // 2, len(content) - 1, chance.randrange(len(content) + 1)))]

    def _extend(self, content: bytes, chance: random.Random) -> bytes:
        count = chance.choice((1, 7, 512, 5000))
        return content + (bytes(count) if chance.random() < 0.5 else chance.randbytes(count))

    def _zero_a_range(self, content: bytes, chance: random.Random) -> bytes:
        begin, end = _range(content, chance)
        return content[:begin] + bytes(end - begin) + content[end:]

    def _repeat_a_range(self, content: bytes, chance: random.Random) -> bytes:
        begin, end = _range(content, chance)
        return content[:end] + content[begin:end] + content[end:]

    def _copy_a_range(self, content: bytes, chance: random.Random) -> bytes:
        begin, end = _range(content, chance)
        target = chance.randrange(len(content) - (end - begin) + 1) if content else 0
        return content[:target] + content[begin:end] + content[target + end - begin :]

    def _remove_a_range(self, content: bytes, chance: random.Random) -> bytes:
        begin, end = _range(content, chance)
        return content[:begin] + content[end:]

    def _swap_two_bytes(self, content: bytes, chance: random.Random) -> bytes | None:
        if len(content) < 2:
            return None
        damaged = bytearray(content)
        first = chance.randrange(len(content) - 1)
        second = chance.choice((first + 1, chance.randrange(len(content))))
        damaged[first], damaged[second] = damaged[second], damaged[first]
        return bytes(damaged)

    def _set_a_length(self, content: bytes, chance: random.Random) -> bytes:
        """Write an extreme number over some bytes, most often the first."""
        size = chance.choice((2, 4, 8))
        number = chance.choice(_LENGTHS) % 2 ** (8 * size)
        begin = chance.choice((0, 0, 4, 8, chance.randrange(len(content) + 1)))
        return content[:begin] + number.to_bytes(size, chance.choice(("little", "big"))) + content[begin + size :]

    def _replace_by_another_file(self, content: bytes, chance: random.Random) -> bytes:
        return chance.choice(self._others)

    def _replace_by_a_pickle(self, content: bytes, chance: random.Random) -> bytes:
        return chance.choice(self._pickles)

    def _edit_json(self, content: bytes, chance: random.Random) -> bytes | None:
        text = _edited(content, chance)
        return None if text is None else text.encode(errors="surrogatepass")

    def _nest_deeply(self, content: bytes, chance: random.Random) -> bytes:
        depth = chance.choice((900, 5000, 200_000))
        opening, closing = chance.choice((("[", "]"), ('{"a":', "}")))
        nested = (opening * depth + "0" + closing * depth * chance.randrange(2)).encode()
        place = content.find(b":", chance.randrange(len(content) + 1)) + 1
        return content[:place] + nested + content[place:] if place else nested

    def _edit_header(self, content: bytes, chance: random.Random) -> bytes | None:
        """Edit the JSON in a safetensors file, and its length."""
        length = int.from_bytes(content[:8], "little")
        text = self._nest_deeply(content[8 : 8 + length], chance) if chance.random() < 0.1 else None
        edited = _edited(content[8 : 8 + length], chance) if text is None else text.decode(errors="replace")
        if edited is None:
            return None
        header = edited.encode(errors="replace")
        header += b" " * max(0, length - len(header))
        return len(header).to_bytes(8, "little") + header + content[8 + length :]


_BLIND = [
    Mutator._flip_a_bit, Mutator._flip_a_bit, Mutator._flip_some_bits, Mutator._change_bytes, Mutator._truncate, Mutator._extend,
    Mutator._zero_a_range, Mutator._repeat_a_range, Mutator._copy_a_range, Mutator._remove_a_range, Mutator._swap_two_bytes,
    Mutator._set_a_length, Mutator._replace_by_another_file, Mutator._replace_by_a_pickle,
]  # fmt: skip
_KINDS: dict[str, list[Callable[[Mutator, bytes, random.Random], bytes | None]]] = {
    "blind": _BLIND,
    "json": [*_BLIND, *[Mutator._edit_json] * 8, Mutator._nest_deeply],
    "safetensors": [*_BLIND, *[Mutator._edit_header] * 5],
}


def edit(value: Any, chance: random.Random) -> Any:
    """Return a JSON value with one part of it replaced, renamed or left out."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    if not places:
        return chance.choice(_VALUES)
    holder, key = chance.choice(places)
    what = chance.random()
    if what < 0.15:
        del holder[key]
    elif what < 0.25 and isinstance(holder, dict):
        holder[chance.choice(("", "x", key + "x"))] = holder.pop(key)
    elif what < 0.4 and isinstance(holder[key], int | float):
        holder[key] = holder[key] + chance.choice((-1, 1, 1000))
    elif what < 0.5 and isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder[key] = chance.choice(_VALUES)
    return value


def _edited(content: bytes, chance: random.Random) -> str | None:
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return json.dumps(edit(value, chance), indent=chance.choice((None, 1)))


def _places(value: Any) -> Any:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _form(content: bytes) -> str:
    if content[:1] == b"{":
        return "json"
    return "safetensors" if content[8:9] == b"{" else "blind"


def _changed(content: bytes, chance: random.Random, count: int, change: Callable[[int], int]) -> bytes | None:
    if not content:
        return None
    damaged = bytearray(content)
    for _ in range(count):
        # Half of the time near the beginning, where headers are.
        place = chance.randrange(len(content) if chance.random() < 0.5 else min(len(content), 200))
        damaged[place] = change(damaged[place])
    return bytes(damaged)


def _range(content: bytes, chance: random.Random) -> tuple[int, int]:
    begin = chance.randrange(len(content) + 1)
    return begin, min(len(content), begin + chance.choice((1, 8, 64, 512, len(content))))


def _archives(canary: Path) -> list[bytes]:
    """Return archives as numpy and torch write them, with pickles in them that make the canary."""
    import io

    import numpy as np
    import torch

    first, second = io.BytesIO(), io.BytesIO()
    evil = np.array([Canary(canary)], dtype=object)
    np.savez(first, x_train=evil, y_train=evil, x_test=evil, y_test=evil, allow_pickle=True)
    torch.save({"weight": Canary(canary)}, second)
    return [first.getvalue(), second.getvalue()]
