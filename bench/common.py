"""What every bench shares: running a command in a process of its own, describing the machine, writing results."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def lowmem_pnn(*arguments: str) -> list[str]:
    """The command line of this installation."""
    return [sys.executable, "-m", "lowmem_pnn", *arguments]


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
    }


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that reads well as text too."""
    widths = [max(len(cell) for cell in column) for column in zip(heads, *rows, strict=True)]
    lines = [" | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    return "\n".join(f"| {line} |" for line in [lines[0], " | ".join("-" * (width - 1) + ":" for width in widths), *lines[1:]])


def write_results(name: str, title: str, text: str, data: dict[str, Any]) -> None:
    """Print a bench's page, and write it and its data to `bench/results/NAME.md` and `.json`."""
    setting = machine()
    lines = "\n".join(f"- {key}: {value}" for key, value in setting.items())
    page = f"# {title}\n\n{text}\n\nMachine:\n\n{lines}\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(page)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": setting, **data}, indent=1) + "\n")
    print(page)
