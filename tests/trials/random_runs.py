"""Trains random networks by random options, each run a process of its own whose memory is read from outside every few milliseconds.

    python tests/trials/random_runs.py FOLDER N [FIRST]    # runs FIRST (0) to FIRST + N - 1; the number of a run is its seed

A run fails that had more private memory than its floor and its budget together, or ended otherwise than with a result or with a refusal
that names a budget; a run that is refused is done again with the budget named, which has to be enough. What each came to is a line of
FOLDER/runs.jsonl; runs that have one already are not done again. Prints one JSON line:
{"runs": n, "trained": n, "refused": n, "above": n, "failed": [...], ...}.

Every tenth run is the command `lowmem-pnn`; the others are forks of this process, which has imported everything and computed nothing.
"""

import contextlib
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lowmem_pnn.memory.tunables import with_tunables

# Seconds between two readings of a run's memory, and for which a run may take.
_INTERVAL, _PATIENCE = 0.003, 400
_PRIVATE = re.compile(rb"Rss(?:Anon|Shmem):\s+(\d+) kB")
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)

_CODE = """import sys

sys.path.insert(0, {folder!r})
import random_networks


def model():
    return random_networks.build({seed})


def data():
    return random_networks.data({seed})
"""


def options_of(seed: int) -> dict[str, Any]:
    """Return the options of a run, by their names on the command line; flags have the value None."""
    chance, kind = random.Random(f"options {seed}"), kind_of(seed)
    method = chance.choice(["exact", "backprop"] if kind == "decoder" else ["pnn", "neuroflux", "exact", "backprop"])
    batch = chance.choice([8, 16, 30, 64])
    optimizer = chance.choice(["sgd", "adam", "adamw", "adamw"])
    options: dict[str, Any] = {
        "method": method,
        "max-gpu-mem": f"{round(2 ** chance.uniform(2.5, 6))}MB",
        "batch-size": batch,
        "optimizer": optimizer,
        "lr": 1e-4,
        "epochs": chance.choice([1, 1, 2]),
        "precision": chance.choice(["fp32", "fp32", "bf16", "fp16"]),
        "commit-every": chance.choice([0.2, 60, 60]),
        "seed": seed,
    }

    def sometimes(share: float, **more: Any) -> None:
        if chance.random() < share:
            options.update({name.replace("_", "-"): value for name, value in more.items()})

    sometimes(0.25, micro_batch=min(batch, chance.choice([4, 7, 16])))
    sometimes(0.25, clip_norm=1.0)
    sometimes(0.2, no_fused=None)
    sometimes(0.2, no_step_in_backward=None)
    sometimes(0.2, keep_commits=3)
    sometimes(0.2, label_smoothing=0.1)
    sometimes(0.2, lr_schedule=chance.choice(["cosine", "onecycle"]))
    sometimes(0.15, val_fraction=0)
    sometimes(0.15, no_compare=None)
    sometimes(0.1, plan_for="time")
    if optimizer != "sgd":
        sometimes(0.35, optimizer_state=chance.choice(["bf16", "int8"]))
    if kind in ("cnn", "torchvision"):
        sometimes(0.3, channels_last=None)
        if "micro-batch" not in options:
            sometimes(0.2, batch_norm="refuse")
    if method == "pnn":
        # By default all but the last recover.
        sometimes(0.35, recovery_epochs=1, recover="all")
    if method in ("pnn", "neuroflux"):
        sometimes(0.4, activation_dtype=chance.choice(["bfloat16", "float16", "int8"]))
    if method == "pnn":
        sometimes(0.3, sil=chance.choice(["normal", "orthogonal", "sparse"]))
        sometimes(0.2, sil_target="pooled")
    if method == "neuroflux":
        sometimes(0.3, visits=chance.choice(["interleaved", "laps=2"]), epochs=2)
        sometimes(0.3, heads=chance.choice(["classic", "linear"]))
    return options


def kind_of(seed: int) -> str:
    """Return the kind of a run's network."""
    import random_networks

    return random_networks.kind_of(seed)


def watched(process: int, workers: Callable[[], Iterable[int]]) -> tuple[int, int, int]:
    """Wait for a process, and read how much private memory its workers have.

    Args:
        process: number of the process, a child of this one.
        workers: gives the processes to read.

    Returns:
        Its exit code, negative for a signal; the highest reading in bytes; the number of readings.
    """
    highest = readings = 0
    end = time.monotonic() + _PATIENCE
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), highest, readings
        for worker in workers():
            highest, readings = max(highest, _private_bytes(worker)), readings + 1
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
        time.sleep(_INTERVAL)


def _private_bytes(process: int) -> int:
    """Read how much memory without a file behind it a process has; 0 where it is gone."""
    with contextlib.suppress(OSError), Path(f"/proc/{process}/status").open("rb", buffering=0) as file:
        return sum(int(kilobytes) for kilobytes in _PRIVATE.findall(file.read(1 << 16))) * 1024
    return 0


def _as_command(arguments: list[str], folder: Path) -> tuple[int, int, int]:
    """Run the command `lowmem-pnn`, which is a supervisor and its worker, and watch the worker."""
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        process = subprocess.Popen([sys.executable, "-m", "lowmem_pnn", *arguments], stdout=out, stderr=err)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

        def workers() -> list[int]:
            with contextlib.suppress(OSError):
                return [int(child) for child in children.read_text().split()]
            return []

        found = watched(process.pid, workers)
        process.returncode = found[0]
    return found


def _as_fork(arguments: list[str], folder: Path) -> tuple[int, int, int]:
    """Run a worker that is a fork of this process, and watch it; one that dies at the wall is gone on with, as by its supervisor."""
    highest = readings = 0
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            _become_worker(arguments, folder)
        code, peak, number = watched(pid, lambda pid=pid: [pid])  # type: ignore[misc]
        highest, readings = max(highest, peak), readings + number
        if -code not in _CRASHES:
            break
        arguments = [*arguments, *(name for name in ("--resume", "--after-crash") if name not in arguments)]
    return code, highest, readings


def _become_worker(arguments: list[str], folder: Path) -> None:
    from lowmem_pnn.cli import commands

    code = 1
    try:
        for name, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
        os.environ["LOWMEM_PNN_WORKER"] = "1"
        sys.argv = ["lowmem-pnn", *arguments]
        commands.main()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        sys.stdout.flush()
        os._exit(code)


def train(seed: int, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run once, watched, and say what came of it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    code = folder / "case.py"
    code.write_text(_CODE.format(folder=str(Path(__file__).resolve().parent), seed=seed))
    texts = [text for name, value in options.items() for text in ([f"--{name}"] if value is None else [f"--{name}", str(value)])]
    fixed = ["--model", f"{code}:model", "--data", f"{code}:data", "--workdir", str(folder / "run"), "--device", "cpu", "--json"]
    run, began = _as_fork if seed % 10 else _as_command, time.monotonic()
    status, peak_bytes, readings = run(["fit", "--no-report", *fixed, *texts], folder)
    said = (folder / "err").read_text().splitlines()
    found: dict[str, Any] = {"code": status, "seconds": round(time.monotonic() - began, 1), "readings": readings}
    found["said"] = said[-1][:400] if said else ""
    if status == 0:
        result = json.loads((folder / "out").read_text())
        # An overshoot that the run itself notices afterwards counts as one.
        highest = max(peak_bytes - result["floor_bytes"], result["peak_bytes"])
        found |= {"budget": result["budget_bytes"], "highest": highest, "retries": result["oom_retries"]}
        found["said"] = " | ".join(line for line in said if "again" in line or "going on" in line)[:400]
    return found


def try_run(seed: int, folder: Path) -> dict[str, Any]:
    """Run, and where the budget was too small, again with the one that was named."""
    options = options_of(seed)
    found = {"number": seed, "kind": kind_of(seed), "options": options, **train(seed, options, folder)}
    if found["code"] == 4:
        named = re.search(r"--max-gpu-mem (\d+MB)", str(found["said"]))
        if named is None:
            return {**found, "fault": "names no budget"}
        found["refused"] = found["said"]
        options["max-gpu-mem"] = named[1]
        found |= train(seed, options, folder)
        if found["code"] == 4:
            return {**found, "fault": "the budget that was named is not enough"}
    if found["code"] != 0:
        return {**found, "fault": f"ended with {found['code']}"}
    return found if found["highest"] <= found["budget"] else {**found, "fault": "above the budget"}


def import_all() -> None:
    """Import what runs import on their way, so that forks need not; leave no garbage that each would look through."""
    import sklearn.metrics  # noqa: F401
    import torch._dynamo
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lowmem_pnn import api  # noqa: F401

    torch.set_num_threads(1)
    with FakeTensorMode():  # computes nothing; without backward, whose threads would not survive a fork
        torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3), torch.nn.BatchNorm2d(3))(torch.empty(2, 3, 8, 8))
    gc.collect()
    gc.freeze()


def main() -> None:
    """Run the trials."""
    # What a worker is started with.
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if tunables != with_tunables(tunables):
        os.environ["GLIBC_TUNABLES"] = with_tunables(tunables)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    import_all()
    folder, count, first = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "runs.jsonl"
    done = {run["number"]: run for run in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    for number in range(first, first + count):
        if number not in done:
            done[number] = try_run(number, folder / "trial")
            with log.open("a") as file:
                file.write(json.dumps(done[number]) + "\n")
    runs = [done[number] for number in range(first, first + count)]
    trained = [run for run in runs if "highest" in run]
    print(
        json.dumps(
            {
                "runs": len(runs),
                "trained": len(trained),
                "refused": sum("refused" in run for run in runs),
                "above": sum(run["highest"] > run["budget"] for run in trained),
                "highest_share": round(max((run["highest"] / run["budget"] for run in trained), default=0.0), 3),
                "failed": [f"{run['number']}: {run['fault']}: {run['said']}" for run in runs if "fault" in run],
                "readings": sum(run["readings"] for run in runs),
                "seconds": round(sum(run["seconds"] for run in runs)),
            }
        )
    )


if __name__ == "__main__":
    main()
