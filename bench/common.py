"""What every bench shares: running a command in a process of its own, describing the machine, writing results."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Finished:
    """A process that ended well: what it printed on stdout, its peak RSS in bytes (its children's included), seconds."""

    stdout: str
    peak_rss_bytes: int
    seconds: float
    cpu_seconds: float


def run_process(command: Sequence[str], **environment: str) -> Finished:
    """Run a command to its end in a process of its own; stderr passes through.

    Raises:
        RuntimeError: it failed.
    """
    began = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, env={**os.environ, **environment})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - began
        out.seek(0)
        text = out.read().decode()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}")
    # Linux gives kibibytes, and the largest of the process and its reaped children.
    return Finished(text, usage.ru_maxrss * 1024, seconds, usage.ru_utime + usage.ru_stime)


def default_emnist() -> str:
    """The stand-in file where there is one, else the official balanced split: a name as `--data` takes it."""
    folder = os.environ.get("LOWMEM_PNN_DATA")
    file = Path(folder) / "emnist47.npz" if folder else None
    return f"npz:{file}" if file is not None and file.exists() else "emnist-balanced"


def default_cifar10() -> str:
    """The CIFAR-10 file where there is one, else the set that torchvision downloads: a name as `--data` takes it."""
    folder = os.environ.get("LOWMEM_PNN_DATA")
    file = Path(folder) / "cifar10.npz" if folder else None
    return f"npz:{file}" if file is not None and file.exists() else "cifar10"


def emnist_in_words(data: str) -> str:
    """What to say beside every figure on it."""
    if data == "emnist-balanced":
        return "Data: the official balanced split, as in the paper."
    return (
        "Data: **not the paper's split**. The paper trains on the official EMNIST balanced split (112,800 training and 18,800 test "
        f"images). This is {Path(data.partition(':')[2]).name}: images of the same 47 classes, 95,495 to train (767 to 2,400 a class) "
        "and 7,050 to test (150 a class, from the official by-merge test split)."
    )


class Cache:
    """Figures of finished runs, a JSON line each, by what was run; beside them the machine, and the state of the code, that they are of.

    Args:
        name: of the bench.
        again: forget what is there.

    `machines` are those of the figures that were asked for, each once.
    """

    def __init__(self, name: str, again: bool) -> None:
        folder = Path(__file__).parent / ".cache"
        folder.mkdir(exist_ok=True)
        self._path = folder / f"{name}.jsonl"
        if again:
            self._path.unlink(missing_ok=True)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        entries = [json.loads(line) for line in lines]
        self._known = {json.dumps(entry["key"]): entry["figures"] for entry in entries}
        self._machines = {json.dumps(entry["key"]): entry.get("machine", {"machine": "not noted"}) for entry in entries}
        self.machines: list[dict[str, Any]] = []

    def knows(self, key: Mapping[str, Any]) -> bool:
        """Whether the run was done before."""
        return json.dumps(dict(key)) in self._known

    def get(self, key: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the run gave when it was done before; else it is done now, and its figures are kept."""
        name = json.dumps(dict(key))
        if name not in self._known:
            print(name, file=sys.stderr, flush=True)
            self._known[name], self._machines[name] = run(), machine()
            with self._path.open("a") as file:
                entry = {"key": dict(key), "machine": self._machines[name], "figures": self._known[name]}
                file.write(json.dumps(entry) + "\n")
        found = self._known[name]
        self.machines = distinct([*self.machines, self._machines[name]])
        assert isinstance(found, dict)
        return found


def lowmem_pnn(*arguments: str) -> list[str]:
    """The command line of this installation."""
    return [sys.executable, "-m", "lowmem_pnn", *arguments]


def arguments_of(fields: Mapping[str, Any]) -> list[str]:
    """Fields of `FitConfig` as the command line takes them; one that is True is a switch."""
    arguments: list[str] = []
    for name, value in fields.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(flag)
            continue
        values = [f"{key}={part}" for key, part in value.items()] if isinstance(value, dict) else [value]
        arguments += [part for value in values for part in (flag, str(value))]
    return arguments


def plan_report(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `lowmem-pnn plan` says of these fields: a plan that does not fit has an exit code, and a report all the same.

    Raises:
        RuntimeError: there is none.
    """
    command = lowmem_pnn("plan", "--json", *arguments_of(fields))
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout
    if not text:
        raise RuntimeError(f"no plan came of {' '.join(command)}")
    report: dict[str, Any] = json.loads(text)
    return report


def machine() -> dict[str, Any]:
    """What figures depend on besides the code."""
    model = next(
        (line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?"
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "system": platform.platform(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
        "load_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "safetensors", "numpy", "lowmem-pnn")},
        "code": _state_of_code(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _state_of_code() -> str:
    """The commit, `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "?"


def distinct(machines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Machines that differ in more than their load: of those that do not, the first."""
    by_rest = {json.dumps({**one, "load_1min": None}): one for one in reversed(machines)}
    return list(reversed(by_rest.values()))


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as text too."""
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    lines = [" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("-" * (width - 1) + ":" for width in widths), *lines[1:]])


def write_results(
    name: str,
    title: str,
    text: str,
    data: dict[str, Any],
    quiet: bool = False,
    write: bool = True,
    machines: Sequence[dict[str, Any]] = (),
) -> None:
    """Write a bench's page and its data to `bench/results/NAME.md` and `.json`, and print the page unless told to be quiet.

    A short form prints alone: what it measures is not what the page says (`write`). `machines` are those of the figures, where some were
    kept from earlier (`Cache.machines`); by default this one.
    """
    described = list(machines) or [machine()]
    setting = described[-1]
    blocks = ["\n".join(f"- {key}: {value}" for key, value in one.items()) for one in described]
    heads = ["Machine:"] if len(blocks) == 1 else [f"Machine {place} of {len(blocks)}:" for place in range(1, len(blocks) + 1)]
    page = (
        f"# {title}\n\n{text}\n\n" + "\n\n".join(f"{head}\n\n{lines}" for head, lines in zip(heads, blocks, strict=True)) + "\n"
    )
    if not write:
        print(page)
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(page)
    more = {"machines": described} if len(described) > 1 else {}
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": setting, **more, **data}, indent=1) + "\n")
    if not quiet:
        print(page)


class StepMeter:
    """What the steps of a loop in this process cost: seconds, CPU seconds, bytes written, and memory above what imports hold.

    `begin` is called after the imports, `lap` after every step. Linux alone; nothing but the standard library, so that it can be used
    under an interpreter that has another contender's packages and not ours.
    """

    def __init__(self) -> None:
        self._laps: list[tuple[float, float, int]] = []
        self._floor_private = self._floor_rss = self._peak_private = 0

    def begin(self) -> None:
        """Take the floor and begin to watch private memory, every 10 ms."""
        status = _status()
        self._floor_private = self._peak_private = status["RssAnon"] + status["RssShmem"]
        self._floor_rss = status["VmRSS"]
        threading.Thread(target=self._watch, daemon=True).start()

    def lap(self) -> None:
        """A step ended, or the first one begins."""
        io = {key: int(value) for key, value in (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())}
        # Asynchronous direct writes are in write_bytes alone; a page that is written again before it reaches the disk in wchar alone.
        self._laps.append((time.monotonic(), time.process_time(), max(io["write_bytes"], io["wchar"])))

    def figures(self, skip: int) -> dict[str, float]:
        """Means over the steps after the first `skip`, and peaks in bytes."""
        begin, end = self._laps[skip], self._laps[-1]
        steps = len(self._laps) - 1 - skip
        peak_rss = _status()["VmHWM"]
        return {
            "seconds": (end[0] - begin[0]) / steps,
            "cpu_seconds": (end[1] - begin[1]) / steps,
            "written": (end[2] - begin[2]) / steps,
            "peak_rss": peak_rss,
            "rss_above_imports": peak_rss - self._floor_rss,
            "private_above_imports": self._peak_private - self._floor_private,
        }

    @property
    def peak_private_bytes(self) -> int:
        """Highest private memory so far, above what imports hold."""
        return self._peak_private - self._floor_private

    def step_seconds(self) -> list[float]:
        """Wall seconds of every step."""
        return [after[0] - before[0] for before, after in pairwise(self._laps)]

    def _watch(self) -> None:
        while True:
            status = _status()
            self._peak_private = max(self._peak_private, status["RssAnon"] + status["RssShmem"])
            time.sleep(0.01)


def _status() -> dict[str, int]:
    """The sizes in /proc/self/status, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[-1] == "kB"}


def fit(workdir: Path, *arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]], Finished]:
    """Run `lowmem-pnn fit` on the CPU with these arguments.

    Returns:
        Its result, the lines of its metrics.jsonl that are about single steps, in order, and the process. Seconds and bytes in the
        lines are the run's totals so far; so is `cpu_seconds`, which is added here.
    """
    command = lowmem_pnn("fit", "--device", "cpu", "--workdir", str(workdir), "--log-every", "1", "--json", "--quiet", *arguments)
    seen: list[float] = []
    over = threading.Event()
    watcher = threading.Thread(target=_watch_lines, args=(workdir / "metrics.jsonl", seen, over))
    watcher.start()
    try:
        done = run_process(command)
    finally:
        over.set()
        watcher.join()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [{**line, "cpu_seconds": cpu} for line, cpu in zip(lines, [*seen, *[float("nan")] * len(lines)], strict=False)]
    return json.loads(done.stdout), [line for line in steps if "step" in line], done


def _watch_lines(path: Path, seen: list[float], over: threading.Event) -> None:
    """Note the CPU seconds of this process's descendants whenever a file has a new line."""
    size = 0
    while not over.wait(0.01):
        with suppress(OSError):
            if path.stat().st_size != size:
                text = path.read_bytes()
                size = len(text)
                seen += [_cpu_of_descendants()] * (text.count(b"\n") - len(seen))


def _cpu_of_descendants() -> float:
    """CPU seconds of all living processes that this one has started, or they."""
    parents, ticks = {}, {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError):
            if folder.name.isdigit():
                # After the command's name in brackets: state, parent, ...; user and system time are the 14th and 15th of all.
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)], ticks[int(folder.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {os.getpid()}
    while more := {number for number, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks[number] for number in family - {os.getpid()}) / os.sysconf("SC_CLK_TCK")


def step_means(lines: Sequence[dict[str, Any]], skip: int) -> dict[str, float]:
    """Seconds, CPU seconds, bytes read and written of a step: means over those after the first `skip` > 0 of the lines of `fit`."""
    begin, end = lines[skip - 1], lines[-1]
    names = {"seconds": "seconds", "cpu_seconds": "cpu_seconds", "read": "bytes_read", "written": "bytes_written"}
    return {name: (end[key] - begin[key]) / (len(lines) - skip) for name, key in names.items()}


def last_json(text: str) -> Any:
    """What a process printed as its last line; libraries print before it."""
    return json.loads(text.splitlines()[-1])


def place_text(given: Path | None, folder: Path, seed: int) -> tuple[Path, str]:
    """A copy of a text to train on, under a name that is the same everywhere, and what it is in words."""
    text, words = find_text(given)
    copy = folder / "text"
    if text is not None:
        shutil.copyfile(text, copy)
    else:
        copy.write_bytes(np.random.Generator(np.random.Philox(seed)).bytes(1_000_000))
    return copy, words


def find_text(given: Path | None) -> tuple[Path | None, str]:
    """A text to train on, and what it is in words: the given file, tinyshakespeare where there is one, or None for random bytes."""
    if given is not None:
        return given, given.name
    folders = [os.environ.get("LOWMEM_PNN_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    files = [Path(folder) / "tinyshakespeare.txt" for folder in folders if folder]
    found = next((file for file in files if file.is_file()), None)
    return found, "random bytes" if found is None else found.name
