"""The process's memory cgroup: its limit and those around it, and the pages of files that it gives back."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from lowmem_pnn.memory import cgroup
from lowmem_pnn.memory.cgroup import NO_BOUND, bytes_left, oom_kills

Layout = Callable[[str, Mapping[str, str]], None]


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """Lays out what the process is told of its groups, and their files."""

    def lay_out(own: str, files: Mapping[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)

    monkeypatch.setattr(cgroup, "_OWN", tmp_path / "own")
    monkeypatch.setattr(cgroup, "_ROOT", tmp_path)
    return lay_out


def test_cached_files_do_not_count_as_used(layout: Layout) -> None:
    layout(
        "0::/\n",
        {"memory.max": "8000\n", "memory.current": "7900\n", "memory.stat": "anon 900\ninactive_file 5000\nactive_file 2000\n"},
    )
    assert bytes_left() == 7100
    layout("0::/\n", {"memory.max": "max\n"})
    assert bytes_left() == NO_BOUND


def test_the_least_of_a_group_and_those_around_it_counts(layout: Layout) -> None:
    own = {"a/b/memory.max": "8000", "a/b/memory.current": "1000", "a/b/memory.events": "oom 3\noom_kill 2\n"}
    layout("0::/a/b\n", own)
    assert (bytes_left(), oom_kills()) == (7000, 2)
    layout("0::/a/b\n", {"a/memory.max": "9000", "a/memory.current": "6000"})
    assert bytes_left() == 3000


def test_the_first_version_has_other_names(layout: Layout) -> None:
    files = {
        "memory.limit_in_bytes": "500",
        "memory.usage_in_bytes": "450",
        "memory.stat": "total_inactive_file 50\ninactive_file 9\n",
    }
    files["memory.oom_control"] = "under_oom 0\noom_kill 4\n"
    groups = "5:cpu,cpuacct:/else\n4:memory:/job\n0::/user\n"
    layout(groups, {f"memory/job/{name}": text for name, text in files.items()})
    assert (bytes_left(), oom_kills()) == (100, 4)


@pytest.mark.parametrize("group", ["/docker/0123", "/../other"])
def test_a_path_outside_of_the_container_is_its_outermost_folder(layout: Layout, group: str) -> None:
    layout(f"0::{group}\n", {"memory.max": "500", "memory.current": "400"})
    assert (bytes_left(), oom_kills()) == (100, 0)


def test_without_groups_there_is_no_bound(layout: Layout) -> None:
    assert (bytes_left(), oom_kills()) == (NO_BOUND, 0), "no such file"
    layout("1:name=systemd:/\n", {})
    assert (bytes_left(), oom_kills()) == (NO_BOUND, 0)
