"""Runs small commands again and again, each time with one file call that fails, and again without a fault; compares what comes of it.

    python tests/trials/disk_faults.py SCENARIO FOLDER all             # every call x every fault that it can have
    python tests/trials/disk_faults.py SCENARIO FOLDER sample N SEED   # N of these: the kinds of call and fault in turn, the call at random

SCENARIO is a name in `SCENARIOS`, or several with commas between them.
Faults are ENOSPC, EDQUOT, EIO and a transfer of half the bytes (short); each at one call alone, and
(ENOSPC, EIO, short; with a `+`) at that call and all later ones that it can befall.

A trial passes where the command ends as if there had been no fault (same bytes), or with exit code 5 and one line that names a file or
a folder; and where afterwards, the fault gone, going on gives the same bytes as a run that was left alone. A C library that is
preloaded (`disk_faults.c`, built by gcc) makes the faults, in forks of this process, which has imported everything and computed nothing.
Prints a JSON line for each scenario: {"calls": n, "trials": n, "survived": n, "refused": n, "unreached": n, "failed": [...], "table": {...}}.
"""

import ctypes
import errno
import gc
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowmem_pnn.config.fit_config import FitConfig

SOURCE = Path(__file__).with_suffix(".c")
FIT = (
    "fit --quiet --max-gpu-mem 100MB --device cpu --model mlp:64-2048-10 --data npz:$DISK_FAULTS_DATA --cuts 1 --epochs 1 --batch-size 64 "
    "--commit-every 0 --keep-commits 2 --no-compare --workdir run"
)
PNN = f"{FIT} --method pnn --kappa 1"
RESUME = "fit --quiet --resume --workdir run"
EXIT = "export run --exit 1 --out out"
# name -> (scenarios that are run before, what is tried, what is run after a fault: the first that does not end with code 6 or 3)
SCENARIOS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "pnn": ((), PNN, (RESUME, PNN)),
    "exact": ((), f"{FIT} --method exact", (RESUME, f"{FIT} --method exact")),
    "neuroflux": ((), f"{FIT} --method neuroflux", (RESUME, f"{FIT} --method neuroflux")),
    "resume": (("stopped",), RESUME, (RESUME,)),
    "overwrite": (("pnn",), f"{PNN} --overwrite", (f"{PNN} --overwrite",)),
    "evaluate": (("pnn",), "evaluate run", ("evaluate run",)),
    "export": (("pnn",), "export run", ("export run",)),
    "exit": (("neuroflux",), EXIT, (EXIT,)),
    "again": (("neuroflux", "exit"), EXIT, (EXIT,)),
}
READ, WRITE, MAKE, SYNC, REMOVE, LOOK, CLOSE = (1 << bit for bit in range(7))  # as in the C file
FAULTS = {"ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT, "EIO": errno.EIO, "short": -1}
LASTING = ("ENOSPC", "EIO", "short")
# What a fault can befall: a full disk nothing that only looks.
_BEFALLS = {"ENOSPC": WRITE | MAKE | SYNC, "EDQUOT": WRITE | MAKE | SYNC | REMOVE | CLOSE, "EIO": -1, "short": READ | WRITE}
_LASTING_BEFALLS = {"ENOSPC": WRITE | MAKE | SYNC, "EIO": -1, "short": READ | WRITE}


class Call(ctypes.Structure):
    """One file call, as the library notes it."""

    _fields_ = (("name", ctypes.c_char * 16), ("kind", ctypes.c_int), ("path", ctypes.c_char * 108))


class Record(ctypes.Structure):
    """What forks have done: shared memory."""

    _fields_ = (("count", ctypes.c_int), ("hits", ctypes.c_int), ("first_hit", ctypes.c_int), ("calls", Call * (1 << 16)))


@dataclass(frozen=True)
class Trial:
    """A fault at a call, counted from 0."""

    number: int
    fault: str
    lasts: bool

    def __str__(self) -> str:
        return self.fault + "+" * self.lasts


def preload(folder: Path) -> None:
    """Build the library and begin this process anew with it, unless it is there."""
    if "DISK_FAULTS" not in os.environ:
        library = folder / "disk_faults.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-D_GNU_SOURCE", "-o", library, SOURCE, "-ldl"], check=True)
        environment = {**os.environ, "DISK_FAULTS": str(library), "LD_PRELOAD": str(library), "LOWMEM_PNN_WORKER": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


class Trials:
    """Runs commands in forks of this process.

    Args:
        folder: Folder for all files; below it `place` is where faults happen.
    """

    def __init__(self, folder: Path) -> None:
        self.place = folder / "place"
        self._outputs = folder / "outputs"
        self._outputs.mkdir(parents=True)
        self._library = ctypes.CDLL(os.environ["DISK_FAULTS"])
        self._library.new_record.restype = ctypes.POINTER(Record)
        self.record: Record = self._library.new_record().contents

    def run(self, command: str | Callable[[], None], trial: Trial | None = None, *, counts: bool = False) -> tuple[int, str, str]:
        """Run a command of `lowmem-pnn`, or a function; return its exit code, and what it wrote to stdout and stderr."""
        self._library.new_record()
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                self._become(command, trial, counts)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 0
            except BaseException:
                self._library.disarm_faults()
                traceback.print_exc()
            finally:
                self._library.disarm_faults()
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return code, *((self._outputs / name).read_text() for name in ("out", "err"))

    def _become(self, command: str | Callable[[], None], trial: Trial | None, counts: bool) -> None:
        """Be the process that runs a command."""
        for name, descriptor in (("out", 1), ("err", 2)):
            file = os.open(self._outputs / name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666)
            os.dup2(file, descriptor)
            os.close(file)
        torch.set_num_threads(1)
        os.chdir(self.place)
        temporary = self.place / "tmp"
        temporary.mkdir(exist_ok=True)
        tempfile.tempdir = str(temporary)
        if trial is not None or counts:
            number, fault, lasts = (-1, 0, 0) if trial is None else (trial.number, FAULTS[trial.fault], int(trial.lasts))
            self._library.arm_faults(os.fsencode(self.place), number, fault, lasts)
        if callable(command):
            command()
        else:
            sys.argv = ["lowmem-pnn", *os.path.expandvars(command).split()]
            commands.main()

    def begin_with(self, template: Path | None) -> None:
        """Make the place as it is before a trial."""
        shutil.rmtree(self.place, ignore_errors=True)
        if template is None:
            self.place.mkdir()
        else:
            shutil.copytree(template, self.place)


def configured(command: str, **changes: Any) -> "FitConfig":
    """Return the options of a `fit` command."""
    words = iter(os.path.expandvars(command).removeprefix("fit --quiet ").split())
    given: dict[str, Any] = {}
    for word in words:
        name = word.removeprefix("--").replace("-", "_")
        if name == "no_compare":
            given["compare"] = False
        elif (value := next(words)) and name != "workdir":
            given[name] = (
                json.loads(value) if name in ("commit_every", "keep_commits", "kappa", "epochs", "batch_size") else value
            )
    return configure(**{**given, **changes})


def stop_early() -> None:
    """A run that is stopped in its second partition."""
    asked = itertools.count()
    start.begin(configured(PNN), Path("run"), process=Process(should_stop=lambda: next(asked) >= 2))


def profile_once(method: str) -> None:
    """Have forks take the profile of a method's layers from here: half of their time, and no file is touched for it."""
    config = configured(FIT, method=method)
    with open_workload(config, named_inputs(config)) as (device, workload):
        profile = profile_workload(workload, device)
    start.profile_workload = lambda *_: profile  # type: ignore[attr-defined]
    start.warm_up_profiler = api.warm_up_profiler = lambda: None  # type: ignore[attr-defined]


def left(place: Path, out: str) -> dict[str, Any]:
    """What a command leaves that must be the same whatever happened before."""
    files = [
        path for pattern in ("run/*.safetensors", "run/ex*/*.safetensors", "out/*.safetensors") for path in place.glob(pattern)
    ]
    found: dict[str, Any] = {str(path.relative_to(place)): path.read_bytes() for path in files}
    result = json.loads((place / "run" / "result.json").read_text())
    found |= {key: result[key] for key in ("test_accuracy", "test_loss", "train_loss", "val_loss")}
    found["lines"] = len((place / "run" / "metrics.jsonl").read_text().splitlines())
    found["programs"] = sorted(str(path.relative_to(place)) for path in place.rglob("*.pt2"))
    found["rest"] = sorted(path.name for path in (place / "run").iterdir()) + sorted(path.name for path in place.glob(".*"))
    found["tmp"] = len(list((place / "tmp").iterdir()))
    return found | ({"out": out} if out.startswith("test_") else {})


def fault_of(trials: Trials, scenario: str, template: Path | None, trial: Trial, expected: dict[str, Any]) -> tuple[str, str]:
    """Carry out a trial; return what came of it, and what was wrong with it ("" if nothing)."""
    _, command, after = SCENARIOS[scenario]
    trials.begin_with(template)
    code, out, err = trials.run(command, trial)
    if not trials.record.hits:
        return "unreached", ""
    call = trials.record.calls[trials.record.first_hit]
    what = f"{call.name.decode()} {call.path.decode(errors='replace')}"
    lines = err.splitlines()
    if code == 0:
        kind = "survived"
        try:
            found = left(trials.place, out)
        except (OSError, ValueError) as error:
            return "failed", f"{what}: exit 0, and {error}"
        # What could not be deleted may stay.
        if wrong := [key for key in expected if key not in ("rest", "tmp") and found.get(key) != expected[key]]:
            return "failed", f"{what}: exit 0 with other {wrong}"
    elif code == 5:
        kind = "refused"
        line = lines[0] if lines else ""
        is_clear = (
            line.startswith("lowmem-pnn: ")
            and ";" in line
            and any(name in line for name in ("run", "tmp", " out", "'out'", str(trials.place)))
        )
        with (trials.place.parent / "messages").open("a") as file:
            file.write(f"{trial} {what}: {line}\n")
        if len(lines) != 1 or not is_clear or "Errno" in line:
            return "failed", f"{what}: unclear: {err[-1500:]!r}"
    else:
        return "failed", f"{what}: exit {code}: {err[-1500:]!r}"
    for again in after:
        code, out, err = trials.run(again)
        if code not in (3, 6):
            break
    if code:
        return "failed", f"{what}: {kind}, then {again!r} gave exit {code}: {err[-1500:]!r}"
    found = left(trials.place, out)
    if kind == "survived" and "rest" in found:
        expected = {**expected, "rest": found["rest"], "tmp": found["tmp"]}
    if wrong := [key for key in expected if found.get(key) != expected[key]]:
        detail = {key: (found.get(key), expected[key]) for key in wrong if not isinstance(expected[key], bytes)}
        return "failed", f"{what}: {kind}, then other {wrong} {detail}"
    return kind, ""


def all_trials(calls: Sequence[tuple[str, int]]) -> Iterator[Trial]:
    """Every call x every fault that can befall it."""
    for number, (_, kind) in enumerate(calls):
        for lasts, befalls in ((False, _BEFALLS), (True, _LASTING_BEFALLS)):
            for fault, kinds in befalls.items():
                if kind & kinds:
                    yield Trial(number, fault, lasts)


def sample(trials: Sequence[Trial], calls: Sequence[tuple[str, int]], count: int, seed: int) -> list[Trial]:
    """Choose trials: kinds of call and fault in turn, at a random call of the kind."""
    chance = random.Random(seed)
    by_kind: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        by_kind.setdefault((calls[trial.number][0], str(trial)), []).append(trial)
    kinds = list(by_kind.values())
    chance.shuffle(kinds)
    return [chance.choice(kind) for kind in itertools.islice(itertools.cycle(kinds), count)]


def run_trials(scenario: str, folder: Path, form: str) -> None:
    """Run the trials of a scenario."""
    before, command, _ = SCENARIOS[scenario]
    trials = Trials(folder / scenario)
    chance = np.random.RandomState(0)
    arrays = {f"x_{part}": chance.rand(count, 64).astype(np.float32) for part, count in (("train", 64), ("test", 40))}
    labels = {f"y_{part}": np.arange(count) % 10 for part, count in (("train", 64), ("test", 40))}
    os.environ["DISK_FAULTS_DATA"] = str(folder / scenario / "data.npz")
    np.savez(os.environ["DISK_FAULTS_DATA"], **arrays, **labels)
    profile_once(next((name for name in ("exact", "neuroflux") if name in (scenario, *before)), "pnn"))
    template: Path | None = None
    if before:
        trials.begin_with(None)
        for name in before:
            code, _, err = trials.run(stop_early if name == "stopped" else SCENARIOS[name][1])
            assert code == (99 if name == "stopped" else 0), err
        template = folder / scenario / "template"
        shutil.copytree(trials.place, template)
    trials.begin_with(template)
    code, out, err = trials.run(command, counts=True)
    assert code == 0 and not err, f"the run that is left alone gives exit {code}: {err}"  # noqa: PT018
    if form == "calls":
        for call in trials.record.calls[: trials.record.count]:
            print(call.name.decode(), call.path.decode())
        return
    calls = [(call.name.decode(), call.kind) for call in trials.record.calls[: trials.record.count]]
    if "stopped" in before:  # the same as a run that was never stopped
        trials.begin_with(None)
        code, out, err = trials.run(PNN)
        assert code == 0, err
    expected = left(trials.place, out)
    chosen = list(all_trials(calls))
    if form == "sample":
        chosen = sample(chosen, calls, int(sys.argv[4]), int(sys.argv[5]))
    counts = dict.fromkeys(("survived", "refused", "unreached", "failed"), 0)
    table: dict[str, dict[str, dict[str, int]]] = {}
    failed = []
    for trial in chosen:
        kind, wrong = fault_of(trials, scenario, template, trial, expected)
        counts[kind] += 1
        cell = table.setdefault(calls[trial.number][0], {}).setdefault(str(trial), {})
        cell[kind] = cell.get(kind, 0) + 1
        if wrong:
            failed.append(f"{trial} at call {trial.number}: {wrong}")
            print(failed[-1], file=sys.stderr, flush=True)
    found = {"scenario": scenario, "calls": len(calls), "trials": len(chosen), **counts, "failed": failed, "table": table}
    print(json.dumps(found), flush=True)


def main() -> None:
    """Run the trials."""
    torch.set_num_threads(1)
    # What was imported is no garbage of a fork: looking through it there would copy it.
    gc.freeze()
    for scenario in sys.argv[1].split(","):
        run_trials(scenario, Path(sys.argv[2]).absolute(), sys.argv[3])


if __name__ == "__main__":
    work = Path(sys.argv[2]).absolute()
    if "DISK_FAULTS" not in os.environ:
        for name in sys.argv[1].split(","):
            shutil.rmtree(work / name, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        preload(work)
    # Not used here, some of them: what a command imports on its way, so that its forks need not.
    import numpy as np
    import sklearn.metrics  # noqa: F401
    import torch
    import torch._dynamo
    import torch.export

    from lowmem_pnn import api
    from lowmem_pnn.cli import commands
    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.run.process import Process
    from lowmem_pnn.training import start
    from lowmem_pnn.training.setup import open_workload
    from lowmem_pnn.workload import profile_workload
    from lowmem_pnn.workload.inputs import named_inputs

    main()
