"""Measures what durability costs: the same run with commits, syncs and hashes, and without any, in turn.

    python tests/trials/durability.py METHOD FOLDER PAIRS          # runs of two to three minutes; METHOD is pnn, exact or neuroflux
    python tests/trials/durability.py METHOD FOLDER PAIRS small    # of a second

Durable is a run as it is by default: a commit every 60 seconds and at the end of every visit. Bare is one that commits at the end of
visits alone, where nothing is synced and nothing is hashed. Runs are forks of this process, with one thread to compute; of each pair the
first is durable or bare by turns. Prints one JSON line: the median over the pairs of what durable takes more, of CPU time (all threads)
and of wall time, and the seconds of every run.
"""

import gc
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Not used here: what a run imports on its way, so that its forks need not.
import sklearn.datasets
import sklearn.metrics  # noqa: F401
import torch
import torch._dynamo

from lowmem_pnn import api as trainer
from lowmem_pnn.run.commits import Commits
from lowmem_pnn.stores import disk, shard_file

MODELS = {"full": "mlp:64-2048-2048-2048-10", "small": "mlp:64-128-128-128-10"}
# Enough for two to three minutes on a core.
EPOCHS = {"full": {"pnn": 60, "exact": 20, "neuroflux": 60}, "small": {"pnn": 2, "exact": 2, "neuroflux": 2}}


def without_durability() -> None:
    """Have nothing synced and nothing hashed in this process."""
    os.fsync = lambda descriptor: None
    disk._read_in_chunks = lambda path, process, counter: None  # what hashes of files read
    shard_file.zlib = SimpleNamespace(crc32=lambda *arguments: 0)  # type: ignore[assignment]


def run(method: str, folder: Path, size: str, *, durable: bool) -> dict[str, float]:
    """Train once in a fork; its CPU seconds, its wall seconds, and the commits and syncs that it made."""
    shutil.rmtree(folder, ignore_errors=True)
    began, (reader, writer) = time.monotonic(), os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            counts = _count()
            if not durable:
                without_durability()
            options: dict[str, Any] = {} if durable else {"commit_every": 1e9}
            trainer.fit(
                MODELS[size], "digits", max_gpu_mem="400MB", workdir=folder, device="cpu", optimizer="adamw", cuts="1,2",
                method=method, epochs=EPOCHS[size][method], **options,
            )  # fmt: skip
            os.write(writer, json.dumps(counts).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status, usage = os.wait4(pid, 0)
    assert status == 0, f"a run failed: {status}"
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": time.monotonic() - began, **json.loads(text)}


def _count() -> dict[str, int]:
    """Count commits and syncs of this process from now on."""
    counts = {"commits": 0, "syncs": 0}
    commit, sync = Commits.commit, os.fsync

    def counted_commit(self: Commits, *arguments: Any) -> None:
        counts["commits"] += 1
        commit(self, *arguments)

    def counted_sync(descriptor: int) -> None:
        counts["syncs"] += 1
        sync(descriptor)

    Commits.commit, os.fsync = counted_commit, counted_sync  # type: ignore[assignment,method-assign]
    return counts


def main() -> None:
    """Run the pairs."""
    method, folder, pairs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    size = sys.argv[4] if len(sys.argv) > 4 else "full"
    torch.set_num_threads(1)
    # What was imported is no garbage of a fork: looking through it there would copy it.
    gc.freeze()
    run(method, folder, "small", durable=True)  # files that are read the first time
    runs: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for number in range(pairs):
        for durable in (True, False) if number % 2 else (False, True):
            runs[durable].append(run(method, folder, size, durable=durable))
    shutil.rmtree(folder, ignore_errors=True)
    more = {
        key: statistics.median(one[key] / other[key] - 1 for one, other in zip(runs[True], runs[False], strict=True))
        for key in ("cpu", "wall")
    }
    rounded = [[{key: round(value, 2) for key, value in one.items()} for one in runs[durable]] for durable in (True, False)]
    print(
        json.dumps(
            {"more_cpu": round(more["cpu"], 4), "more_wall": round(more["wall"], 4), "durable": rounded[0], "bare": rounded[1]}
        )
    )


if __name__ == "__main__":
    main()
