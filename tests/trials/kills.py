"""Runs a small training again and again, killed by SIGKILL at a chosen place, resumed, and compared with the one that was left alone.

    python tests/trials/kills.py METHOD FOLDER all           # a kill at every step of the commit protocol
    python tests/trials/kills.py METHOD FOLDER points        # at the first and last step of each kind; also: first, last
    python tests/trials/kills.py METHOD FOLDER random N SEED # N kills at random moments

METHOD is pnn, exact, or recovery (pnn with a recovery epoch after it).

Every trial is a fork of this process, which has imported everything and computed nothing: torch's threads do not survive a fork.
Prints one JSON line: {"trials": n, "killed": n, "failed": [...]}.
"""

import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# Not used here: what a run imports on its way, so that its forks need not.
import sklearn.datasets
import sklearn.metrics  # noqa: F401
import torch
import torch._dynamo

from lowmem_pnn import api as trainer
from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.stores import disk

METHODS = {
    "pnn": {"epochs": (2, 3), "cuts": "1", "kappa": 1.0, "train_limit": 300},
    "exact": {"method": "exact", "epochs": 2, "cuts": "1,2", "train_limit": 250},
    "recovery": {"epochs": 1, "recovery_epochs": 2, "cuts": "1,2", "kappa": 1.0, "train_limit": 150},
}
COMMON = {"optimizer": "adamw", "commit_every": 0.0, "device": "cpu"}  # commits after every batch


def train(path: Path, resume: bool) -> None:
    """The run that is killed."""
    trainer.fit("mlp:64-32-32-10", "digits", max_gpu_mem="100MB", workdir=path, resume=resume, **METHODS[sys.argv[1]], **COMMON)


def in_child(work: Callable[[], None], kill_after: float | None = None) -> int:
    """Run in a forked process; its exit status as `os.waitstatus_to_exitcode` gives it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            # One thread of torch and a stdout of its own: nothing of the parent's is touched.
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def until_point(path: Path, wanted: int, resume: bool = False) -> Callable[[], None]:
    """A run that kills itself at the `wanted`th commit point."""

    def work() -> None:
        count = 0

        def reached(name: str) -> None:
            nonlocal count
            if count == wanted:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        disk.commit_point = reached
        train(path, resume)

    return work


def count_points(path: Path) -> list[str]:
    """The names of the commit points of a run that is left alone."""
    log = path.with_suffix(".points")

    def work() -> None:
        def note(name: str) -> None:
            with log.open("a") as file:
                file.write(name + "\n")

        disk.commit_point = note
        train(path, resume=False)

    assert in_child(work) == 0, "the run that is left alone fails"
    return log.read_text().splitlines()


def finish(path: Path) -> None:
    """Resume, or begin where the kill came before there was a run."""
    try:
        train(path, resume=True)
    except CheckpointError as error:
        if "no run to resume" not in str(error):
            raise
        train(path, resume=False)


def same(path: Path, reference: Path) -> bool:
    """Whether two runs ended with the same bytes, and the same scores."""
    if (path / "model.safetensors").read_bytes() != (reference / "model.safetensors").read_bytes():
        return False
    first, second = (json.loads((run / "result.json").read_text()) for run in (path, reference))
    keys = ("test_accuracy", "test_loss", "train_loss", "val_loss")
    lines = [len((run / "metrics.jsonl").read_text().splitlines()) for run in (path, reference)]
    return all(first[key] == second[key] for key in keys) and lines[0] == lines[1]


def _last(names: list[str], name: str) -> int:
    return len(names) - 1 - names[::-1].index(name)


def main() -> None:
    """Run the trials."""
    folder, kind = Path(sys.argv[2]), sys.argv[3]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # What was imported is no garbage of a fork: looking through it there would copy it.
    gc.freeze()
    reference = folder / "reference"
    points = count_points(reference)
    began = time.monotonic()
    assert in_child(lambda: train(folder / "timed", False)) == 0
    duration = time.monotonic() - began
    assert same(folder / "timed", reference), "two runs that are left alone differ"
    if kind != "random":
        kinds = [re.sub(r"\d+|\.reference\S*", "", name) for name in points]
        first, last = {kinds.index(name) for name in kinds}, {_last(kinds, name) for name in kinds}
        wanted = {"all": range(len(points)), "points": first | last, "first": first, "last": last}[kind]
        trials = [(f"{number} ({points[number]})", number, None) for number in sorted(wanted)]
    else:
        chance = random.Random(int(sys.argv[5]))
        moments = [chance.uniform(0, duration) for _ in range(int(sys.argv[4]))]
        trials = [(f"{moment:.3f} s", -1, moment) for moment in moments]
    killed, failed = 0, []
    for name, point, moment in trials:
        path = folder / "trial"
        shutil.rmtree(path, ignore_errors=True)
        code = in_child(until_point(path, point), kill_after=moment)
        killed += code == -signal.SIGKILL
        if in_child(lambda path=path: finish(path)) != 0 or not same(path, reference):
            failed.append(name)
    print(
        json.dumps(
            {"trials": len(trials), "killed": killed, "failed": failed, "points": len(points), "seconds": round(duration, 2)}
        )
    )


if __name__ == "__main__":
    main()
