"""Does a run complete inside a memory limit of the operating system at floor + budget?

First a run without a limit tells the floor. Then the same run goes into a memory cgroup (version 1 or 2) whose limit is floor +
budget, where one can be made; elsewhere under `RLIMIT_DATA`, at what the process's data segment is when it begins to train, plus
the budget. The kernel kills what passes a cgroup's limit; page cache counts there too, and is reclaimed.

    python bench/os_limit.py [--budget 256MB] [--depth 32] [--quick]

--quick takes 4 layers.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from common import lowmem_pnn, markdown_table, run_process, write_results

from lowmem_pnn.units import parse_bytes

MB = 1e6


def fit_command(depth: int, budget: str, workdir: str) -> list[str]:
    """The work: a multilayer perceptron of width 2048 on the digits."""
    spec = "mlp:" + "-".join(["64", *["2048"] * depth, "10"])
    options = ["--model", spec, "--data", "digits", "--epochs", "1", "--lr", "1e-4", "--kappa", "1", "--device", "cpu"]
    return lowmem_pnn("fit", "--max-gpu-mem", budget, *options, "--workdir", workdir, "--json", "--quiet")


def make_cgroup(limit: int) -> Path | None:
    """A memory cgroup with a limit, or None where none can be made."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        hierarchy, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            parent, name = Path("/sys/fs/cgroup/memory") / group.lstrip("/"), "memory.limit_in_bytes"
        elif hierarchy == "0":
            parent, name = Path("/sys/fs/cgroup") / group.lstrip("/"), "memory.max"
        else:
            continue
        folder = parent / f"lowmem-pnn-{os.getpid()}"
        with suppress(OSError):
            folder.mkdir()
            try:
                (folder / name).write_text(str(limit))
                return folder
            except OSError:
                folder.rmdir()
    return None


def data_floor() -> int:
    """VmData, in bytes, of a process that is about to train."""
    code = (
        "import re; from pathlib import Path; import lowmem_pnn.api; from lowmem_pnn.training.setup import warm_up_profiler;"
        "from lowmem_pnn.engine.worker_threads import WorkerThreads; from lowmem_pnn.device.cpu import warm_up;"
        "import torch, sklearn.datasets, sklearn.metrics; threads = WorkerThreads(); warm_up_profiler(); warm_up(torch.device('cpu'));"
        "print(int(re.search(r'VmData:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) * 1024); threads.close()"
    )
    return int(run_process([sys.executable, "-c", code]).stdout)


def main() -> None:
    """Run with and without the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="256MB")
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="4 layers; writes no page")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.depth = 4
    budget = parse_bytes(arguments.budget)
    with tempfile.TemporaryDirectory() as folder:
        free = json.loads(run_process(fit_command(arguments.depth, arguments.budget, f"{folder}/free")).stdout)
        limit = free["floor_bytes"] + budget
        cgroup = make_cgroup(limit)
        if cgroup is not None:
            how = f"memory cgroup, limit {limit / MB:.0f} MB = floor {free['floor_bytes'] / MB:.0f} MB + budget {budget / MB:.0f} MB"
            procs = cgroup / "cgroup.procs"
            enter = lambda: procs.write_text(str(os.getpid()))  # noqa: E731
        else:
            limit = data_floor() + budget
            how = f"RLIMIT_DATA, {limit / MB:.0f} MB = data segment at the floor + budget {budget / MB:.0f} MB; no memory cgroup could be made"
            enter = lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))  # noqa: E731
        # As the worker itself: the supervisor's own memory is not the run's.
        command = fit_command(arguments.depth, arguments.budget, f"{folder}/limited")
        environment = {**os.environ, "LOWMEM_PNN_WORKER": "1"}
        try:
            done = subprocess.run(command, preexec_fn=enter, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        finally:
            if cgroup is not None:
                cgroup.rmdir()
    limited = json.loads(done.stdout) if done.returncode == 0 else None
    rows = [("none", "0", f"{free['peak_bytes'] / MB:.1f}", f"{free['seconds']:.1f}", f"{free['test_loss']:.6f}", "-")]
    if limited is not None:
        rows.append(
            (
                how.split(",")[0], "0", f"{limited['peak_bytes'] / MB:.1f}", f"{limited['seconds']:.1f}", f"{limited['test_loss']:.6f}",
                str(limited["oom_retries"]),
            )
        )  # fmt: skip
    else:
        rows.append((how.split(",")[0], str(done.returncode), "-", "-", "-", "-"))
    text = "\n".join(
        [
            f"mlp:64-2048x{arguments.depth}-10, training state {free['training_state_bytes'] / MB:.0f} MB; limit: {how}.",
            "",
            markdown_table(("limit", "exit code", "peak above floor MB", "seconds", "test loss", "retries"), rows),
            "",
            f"- completes inside the limit: {limited is not None}",
        ]
    )
    write_results(
        "os_limit",
        "A run inside an operating-system memory limit",
        text,
        {"limit_bytes": limit, "how": how, "free": free, "limited": limited},
        write=not arguments.quick,
    )
    sys.exit(0 if limited is not None else 1)


if __name__ == "__main__":
    main()
