"""Counts what a process holds while partitions come and go: memory, threads, descriptors, and the disk that the run's folder takes.

    python tests/trials/residencies.py METHODS FOLDER N    # METHODS are exact, neuroflux, or pnn (with recovery epochs without end)

The run commits after every batch, or macro-batch, and is left as soon as the Nth residency has ended. Compared are residencies 21 to 60
with the last 40, so that each has every partition and every phase of a commit in it. metrics.jsonl, a log that gets a line an epoch, is
left out. Of each the median counts, since commits go on in the background whenever they come to it.
Prints a JSON line for each method, which is a fork of this process:
{"method": m, "early": {"memory": bytes, "threads": n, "descriptors": n, "disk": bytes}, "late": {...}}.
"""

import gc
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

# Not used here: what a run imports on its way, so that its forks need not.
import sklearn.datasets
import sklearn.metrics  # noqa: F401
import torch
import torch._dynamo

from lowmem_pnn import api as trainer
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.memory.process_meter import private_bytes

SKIPPED, WINDOW = 20, 40
METHODS = {
    "exact": {"method": "exact"},
    "neuroflux": {"method": "neuroflux", "visits": "interleaved", "macro_batches": 1, "heads": "linear"},
    "pnn": {"method": "pnn", "recovery_epochs": 10**4, "recover": "all", "kappa": 1.0},
}
COMMON = {"optimizer": "adamw", "cuts": "1,2", "batch_size": 10, "train_limit": 60, "commit_every": 0.0, "keep_commits": 2}


def held(folder: Path) -> dict[str, int]:
    """Return what this process holds now."""
    files = [path for path in folder.rglob("*") if path.name != "metrics.jsonl"]
    disk = 0
    for path in files:
        try:
            disk += path.lstat().st_blocks * 512
        except FileNotFoundError:  # deleted by the committing thread
            continue
    threads, descriptors = (len([*Path(f"/proc/self/{what}").iterdir()]) for what in ("task", "fd"))
    return {"memory": private_bytes(), "threads": threads, "descriptors": descriptors, "disk": disk}


def train(method: str, folder: Path, count: int) -> None:
    """Run until so many residencies have ended, print what was held, and end the process."""
    shutil.rmtree(folder, ignore_errors=True)
    unload, readings = Residency.unload, list[dict[str, int]]()

    def counted(self: Residency, **options: bool) -> None:
        unload(self, **options)
        # Not all the while: the list would be what grows.
        readings.append(held(folder) if not SKIPPED + WINDOW <= len(readings) < count - WINDOW else readings[0])
        if len(readings) == count:
            windows = {"early": readings[SKIPPED : SKIPPED + WINDOW], "late": readings[-WINDOW:]}
            medians = {
                name: {key: statistics.median_low(one[key] for one in window) for key in window[0]}
                for name, window in windows.items()
            }
            print(json.dumps({"method": method, "residencies": count, **medians}), flush=True)
            os._exit(0)

    Residency.unload = counted  # type: ignore[method-assign]
    epochs = 1 if method == "pnn" else count  # more than are reached
    trainer.fit(
        "mlp:64-32-32-10", "digits", max_gpu_mem="60MB", workdir=folder, device="cpu", epochs=epochs, **COMMON, **METHODS[method]
    )


def main() -> None:
    """Run each method in a process of its own."""
    torch.set_num_threads(1)
    # What was imported is no garbage of a fork: looking through it there would copy it.
    gc.freeze()
    for method in sys.argv[1].split(","):
        pid = os.fork()
        if pid == 0:
            try:
                train(method, Path(sys.argv[2]), int(sys.argv[3]))
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 0, f"{method} ended with {code}"


if __name__ == "__main__":
    main()
