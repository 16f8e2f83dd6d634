"""The memory cgroup of this process: what its limits leave, and kills there. It imports next to nothing, for the supervisor."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

NO_BOUND = 1 << 62
"""Bytes that are no bound."""

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


class _Version(NamedTuple):
    """Names in a version of cgroups: of the outermost group's folder, of a group's files, and of its counters of files' cached pages."""

    root: str
    limit: str
    used: str
    kills: str
    cached: tuple[str, str]


_FIRST = _Version(
    root="memory",
    limit="memory.limit_in_bytes",
    used="memory.usage_in_bytes",
    kills="memory.oom_control",
    cached=("total_inactive_file", "total_active_file"),
)
_SECOND = _Version(
    root="", limit="memory.max", used="memory.current", kills="memory.events", cached=("inactive_file", "active_file")
)


def bytes_left() -> int:
    """Return what this process's memory cgroup, and those around it, leave to it without swapping; `NO_BOUND` where none has a limit."""
    return min((_left_by(folder, version) for folder, version in _groups()), default=NO_BOUND)


def oom_kills() -> int:
    """Return how often the kernel's out-of-memory killer struck in this process's memory cgroup; 0 where that is not known."""
    for folder, version in _groups():
        with suppress(OSError):
            if found := re.search(r"^oom_kill (\d+)", (folder / version.kills).read_text(), re.MULTILINE):
                return int(found[1])
    return 0


def _groups() -> Iterator[tuple[Path, _Version]]:
    """Yield the folders of this process's memory cgroup and of those around it, the innermost first.

    A container may show its group by a path that is outside of it, and not there: the outermost folder is the container's then.
    """
    with suppress(OSError):
        for line in _OWN.read_text().splitlines():
            hierarchy, controllers, group = line.split(":", 2)
            if hierarchy != "0" and "memory" not in controllers.split(","):
                continue
            version = _SECOND if hierarchy == "0" else _FIRST
            names = [name for name in group.split("/") if name]
            for depth in range(0 if ".." in names else len(names), -1, -1):
                yield _ROOT.joinpath(version.root, *names[:depth]), version


def _left_by(folder: Path, version: _Version) -> int:
    try:
        left = int((folder / version.limit).read_text()) - int((folder / version.used).read_text())
    except (OSError, ValueError):  # "max", or no such file
        return NO_BOUND
    # Pages of files count as used, and the kernel takes them back where memory runs short.
    with suppress(OSError):
        counters = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        left += sum(int(counters.get(name, 0)) for name in version.cached)
    return max(0, left)
