"""Whole commands on damaged files: the second half of `damaged_files.py`.

A file of a run or of a user's is damaged, and a command is run that reads it. It ends with one of the codes of what can be wrong and one
line, or as if nothing had been damaged: files of a run are compared, whatever damage was let through.
"""

import os
import random
import resource
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowmem_pnn.cli import commands
from lowmem_pnn.cli.supervisor import WORKER_VARIABLE

if TYPE_CHECKING:
    from damaged_files import Trials

_FIT = "fit --quiet --max-gpu-mem 100MB --device cpu --epochs 1 --workdir new"
# name -> (what is damaged: files of a run, by pattern; the command, in the folder of the trial)
COMMANDS: dict[str, tuple[str, str]] = {
    "resume": ("stopped/**/*", "fit --quiet --resume --workdir stopped"),
    "result": ("done/*", "fit --quiet --resume --workdir done"),
    "evaluate": ("done/*", "evaluate done"),
    "export": ("done/*", "export done --exit 1 --out new"),
    "export again": ("out/*", "export done --exit 1 --out out"),
    "fit, npz": ("users/plain.npz", f"{_FIT} --model mlp:3-4-3 --data npz:users/plain.npz"),
    "fit, text": (
        "users/book.txt",
        f"{_FIT} --method exact --model gpt:layers=1,width=8,heads=1,context=16 --data text:users/book.txt",
    ),
    "fit, images": ("users/folder/*/*", f"{_FIT} --model mlp:189-4-2 --data imagefolder:users/folder"),
    "fit, MNIST": ("users/MNIST/raw/*", f"{_FIT} --model mlp:784-4-10 --data mnist --data-root users"),
}
_CODES = (0, 3, 4, 5, 6, 7)


def run_commands(trials: "Trials", total: int) -> None:
    """Damage `total` files, each before a command.

    Args:
        trials: Keeps count, and has the files that are damaged.
        total: Number of files.
    """
    template = trials.folder.parent / f"{trials.folder.name}.template"
    shutil.rmtree(template, ignore_errors=True)
    for kind in ("png", "jpg", "gif", "tiff"):
        for number, name in enumerate(("one", "two")):
            place = trials.folder / "users" / "folder" / name
            place.mkdir(parents=True, exist_ok=True)
            for copy in range(2):
                shutil.copy(trials.folder / "users" / f"a.{kind}", place / f"{copy + number}.{kind}")
    for left in (trials.folder / "users" / "folder").rglob("*.jpg"):
        left.unlink()  # which is turned, and so of another size
    shutil.copytree(trials.folder, template)
    whole: dict[str, tuple[int, str, Any]] = {}
    for number in range(total):
        name = list(COMMANDS)[number % len(COMMANDS)]
        if name not in whole:
            whole[name] = _outcome(trials, template, name, None)
            assert whole[name][0] == 0, f"{name}: exit {whole[name][0]}: {whole[name][1]}"
        _try_one(trials, template, name, number, whole[name])
    shutil.rmtree(template)


def _try_one(trials: "Trials", template: Path, name: str, number: int, whole: tuple[int, str, Any]) -> None:
    chance = random.Random(f"{trials.seed} command {number}")
    pattern = COMMANDS[name][0]
    files = sorted(
        path.relative_to(template) for path in template.glob(pattern) if path.is_file() and path.name not in ("lock", "evil.py")
    )
    file = chance.choice(files)
    kind, content = trials.mutator.mutate((template / file).read_bytes(), chance)
    code, err, left = _outcome(trials, template, name, (file, content))
    what = f"number {number}, {kind} of {file}"
    lines = err.splitlines()
    if code not in _CODES:
        trials.note(name, "failed", f"{what}: exit {code}: {err[-500:]!r}")
    elif isinstance(left, list):
        trials.note(name, "failed", f"{what}: changed {left}")
    elif code:
        is_clear = len(lines) >= 1 and lines[-1].startswith("lowmem-pnn: ") and "Traceback" not in err
        trials.note(name, "noticed" if is_clear else "failed", "" if is_clear else f"{what}: exit {code}: {err[-500:]!r}")
    elif pattern.startswith("users"):
        trials.note(name, "read", "")
    elif left == whole[2]:
        # A damaged older commit is said, or of a result that is printed nothing else is read.
        trials.note(name, "same", "")
    else:
        different = [key for key in whole[2] if left.get(key) != whole[2][key]]
        trials.note(name, "failed", f"{what}: exit 0 with other {different}")


def _outcome(trials: "Trials", template: Path, name: str, damage: tuple[Path, bytes] | None) -> tuple[int, str, Any]:
    """Run a command in a fork, on a copy of the files; return its code, stderr, and what it left (or a list of what it should not)."""
    folder = trials.folder
    shutil.rmtree(folder)
    shutil.copytree(template, folder)
    if damage is not None:
        (folder / damage[0]).write_bytes(damage[1])
    own = {COMMANDS[name][0].split("/", maxsplit=1)[0], "new"} - {"users"}
    before = {path: state for path, state in trials.world(folder).items() if path.split("/", maxsplit=1)[0] not in own}
    outputs = folder.parent / f"{folder.name}.outputs"
    outputs.mkdir(exist_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            signal.setitimer(signal.ITIMER_REAL, 300)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for stream, descriptor in (("out", 1), ("err", 2)):
                os.dup2(os.open(outputs / stream, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o666), descriptor)
            torch.set_num_threads(1)
            os.chdir(folder)
            os.environ[WORKER_VARIABLE] = "1"
            trials.take_the_network()
            sys.argv = ["lowmem-pnn", *COMMANDS[name][1].split()]
            commands.main()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            for standard in (sys.stdout, sys.stderr):
                standard.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    after = {path: state for path, state in trials.world(folder).items() if path.split("/", maxsplit=1)[0] not in own}
    if changed := [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]:
        return code, (outputs / "err").read_text(), changed
    left = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/*.safetensors")}
    out = (outputs / "out").read_text() if name == "evaluate" else ""
    return code, (outputs / "err").read_text(errors="replace"), {**left, "out": out}
