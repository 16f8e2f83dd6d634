"""Damages files again and again, has them read by this program, and looks at what comes of it.

    python tests/trials/damaged_files.py FOLDER N M SEED             # N damaged files, each read by the function that reads such a file;
                                                                     # and M damaged files, each before a whole command
    python tests/trials/damaged_files.py FOLDER TARGET NUMBER SEED   # one reading again, with its traceback

Files that a run wrote: weights, shards, their index, journals, configuration, what a finished run leaves, exports. Whoever reads them must
notice any change: refuse them in one line, or get the same out of them. Files of a user's: arrays, images, text, MNIST's and CIFAR's,
and weights that `load_weights` reads. They may be read or refused, in one line.

No file may end in another exception, a crash, or a process that hangs; have code run (pickles make a canary); or have anything changed
outside of its run or its folder. Files are read in forks with a bound on memory and time. What has no network finds none.
Prints one JSON line: {"trials": n, "noticed": n, "same": n, "read": n, "memory": n, "failed": [...], "table": {...}}.
"""

import gc
import json
import mmap
import os
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.metrics  # noqa: F401 - what a command imports on its way, so that its forks need not
import torch
import torch._dynamo
import torch.export
import torchvision.datasets
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from damaged_commands import run_commands
from mutations import Mutator, edit

from lowmem_pnn import api
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import CheckpointError, LowMemError, Stopped
from lowmem_pnn.exporting.export_folder import ExportFolder
from lowmem_pnn.run.finished import read_result
from lowmem_pnn.run.process import Process
from lowmem_pnn.run.resume import stored_config
from lowmem_pnn.run.state import State
from lowmem_pnn.sources.datasets import find_dataset
from lowmem_pnn.sources.image_file import decode, read_header
from lowmem_pnn.stores.activation_index import read_index
from lowmem_pnn.stores.activations import ActivationStore
from lowmem_pnn.stores.journal import older_commits, read_journal, seal_journal
from lowmem_pnn.stores.run_directory import RunDirectory
from lowmem_pnn.stores.weights import WeightStore
from lowmem_pnn.training import start

SECONDS = 60  # for one file, on a machine that is busy
MEMORY_BYTES = 1 << 30
_CHUNK = 500
_RUN = {"max_gpu_mem": "100MB", "device": "cpu", "batch_size": 32, "epochs": 2, "commit_every": 0.0, "compare": False}
_NPZ = "x_train", "y_train", "x_test", "y_test"


@dataclass
class Target:
    """A file that is damaged.

    Args:
        path: Path of the file.
        read: Reads it, as the program does, and returns what it got of it, which can be compared.
        is_ours: Whether a run wrote it, so that any change must be noticed.
        edits: Makes a damaged content that is sealed as the program would seal it, which need not be noticed; None if there is no seal.
    """

    path: Path
    read: Callable[[], Any]
    is_ours: bool = True
    edits: Callable[[bytes, random.Random], bytes] | None = None


def make_runs(folder: Path) -> None:
    """Make a run that was stopped in its second partition, runs that have finished, and exports, as all trials find them."""
    chance = np.random.RandomState(0)
    x = chance.rand(150, 20).astype(np.float32)
    y = (x[:, 0] * 3).astype(np.int64)
    np.savez(folder / "data.npz", x_train=x[:120], y_train=y[:120], x_test=x[120:], y_test=y[120:])
    common = {**_RUN, "model": "mlp:20-16-3", "data": f"npz:{folder / 'data.npz'}"}
    count = iter(range(10**6))
    with suppress(Stopped):
        process = Process(should_stop=lambda: next(count) >= 16)
        start.begin(configure(**common, cuts="1", keep_commits=3), folder / "stopped", process=process)
    start.begin(configure(**common, method="neuroflux"), folder / "done")
    api.export(folder / "done", exit="1", out=folder / "out")
    # Code that a damaged file could name.
    (folder / "stopped" / "evil.py").write_text(f"open({str(folder / 'canary')!r}, 'w').close()\n")


def make_users_files(folder: Path) -> None:
    """Make small files of every form that data may have."""
    folder.mkdir()
    chance = np.random.RandomState(1)
    arrays = {name: chance.rand(12, 3).astype(np.float32) if name[0] == "x" else np.arange(12) % 3 for name in _NPZ}
    np.savez(folder / "plain.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", **{**arrays, "x_train": np.arange(36).reshape(12, 3)})
    (folder / "book.txt").write_text("All happy families are alike; each unhappy family is unhappy in its own way. " * 5)
    pixels = chance.randint(0, 256, (9, 7, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    grey16 = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6
    colour.save(folder / "a.png")
    grey16.save(folder / "grey16.png")
    colour.convert("P").save(folder / "palette.png", transparency=0)
    colour.convert("RGBA").save(folder / "alpha.png")
    colour.save(folder / "a.jpg", exif=exif)
    colour.save(folder / "progressive.jpg", progressive=True)
    colour.convert("P").save(folder / "a.gif", save_all=True, append_images=[colour.convert("P").rotate(90)])
    colour.save(folder / "a.bmp")
    colour.save(folder / "a.ppm")
    grey16.save(folder / "grey16.pgm")
    colour.save(folder / "a.tiff", compression="tiff_lzw")
    grey16.save(folder / "grey16.tiff")
    colour.save(folder / "a.webp")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, 6, 28, 28) + bytes(6 * 784))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, 6) + bytes(range(6)))
    import pickle

    cifar = folder / "cifar-10-batches-py"
    cifar.mkdir()
    names = [name for name, _ in torchvision.datasets.CIFAR10.train_list + torchvision.datasets.CIFAR10.test_list]
    for name in names:
        (cifar / name).write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}))
    (cifar / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def reads_of(folder: Path) -> dict[str, Target]:
    """Return what can be damaged and read by itself, by name."""
    stopped, done, users = folder / "stopped", folder / "done", folder / "users"
    body, config_sha256 = read_journal(stopped / "journal.json")
    done_state = State.from_journal(read_journal(done / "journal.json")[0])
    weights = stopped / "weights"
    store = stopped / "activations" / body["activations"]["train"]

    def open_weights() -> Any:
        WeightStore.open(weights, body["weights"])
        return sorted(path.read_bytes() for path in weights.iterdir())

    def open_store() -> Any:
        opened = ActivationStore.open(store, verify=True)
        return read_index(store), opened.specs, (store / "00000.safetensors").read_bytes()

    def open_journal(path: Path) -> Any:
        found, config = read_journal(path)
        return State.from_journal(found).to_journal(), config

    def open_config() -> Any:
        with RunDirectory.open(stopped, to_read=True) as rundir:
            return stored_config(rundir)

    def open_older() -> Any:
        commits, others = older_commits(stopped, config_sha256)
        if others:  # the run goes on without them, and says so
            raise CheckpointError(f"{others} are none of the run's")
        return [found for _, found in commits]

    def open_parsed_config() -> Any:
        """Read a configuration that is sealed."""
        return FitConfig.from_json((stopped / "config.json").read_text(errors="replace"))

    def load() -> Any:
        model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return api.load_weights(model, users / "weights.safetensors")

    def export() -> Any:
        found = ExportFolder.find(done, 0, read_result(done, done_state), folder / "out")
        return found.before["model.pt2"], found.before["model.safetensors"]

    def data(spec: str, form: str = "any") -> Callable[[], Any]:
        def read() -> None:
            opened = find_dataset(spec, users, form, context=16)  # type: ignore[arg-type]
            for part in (opened.train, opened.test):
                if part is not None:
                    part.batch(np.arange(min(4, len(part))))

        return read

    def image(path: Path) -> Callable[[], Any]:
        def read() -> None:
            try:
                header = read_header(path)
            finally:
                pixels = decode(path, deep=False)
            if pixels.shape[:2] == (header.height, header.width):
                decode(path, deep=True)

        return read

    def resealed_journal(content: bytes, chance: random.Random) -> bytes:
        sealed = json.loads(content)
        return seal_journal(edit(sealed["body"], chance), sealed["config_sha256"]).encode()

    def edited(content: bytes, chance: random.Random) -> bytes:
        return json.dumps(edit(json.loads(content), chance)).encode()

    older = sorted(stopped.glob("journal.0*.json"))[-1]
    committed = [weights / entry["file"] for entry in body["weights"]["partitions"]]
    shutil.copy(done / "model.safetensors", users / "weights.safetensors")
    targets = {
        **{f"weights {number}": Target(path, open_weights) for number, path in enumerate(committed)},
        "shard": Target(store / "00000.safetensors", open_store),
        "index": Target(store / "index.json", open_store),
        "journal": Target(stopped / "journal.json", lambda: open_journal(stopped / "journal.json"), edits=resealed_journal),
        "older journal": Target(older, open_older),
        "config": Target(stopped / "config.json", open_config),
        "config, sealed": Target(stopped / "config.json", open_parsed_config, False, edited),
        **{
            name: Target(done / name, lambda: read_result(done, done_state))
            for name in ("model.safetensors", "heads.safetensors", "result.json")
        },
        **{f"export {name}": Target(folder / "out" / name, export) for name in ("export.json", "model.pt2", "model.safetensors")},
        "load_weights": Target(users / "weights.safetensors", load, False),
        "npz": Target(users / "plain.npz", data(f"npz:{users / 'plain.npz'}", "flat"), False),
        "packed npz": Target(users / "packed.npz", data(f"npz:{users / 'packed.npz'}"), False),
        "text": Target(users / "book.txt", data(f"text:{users / 'book.txt'}"), False),
        "MNIST images": Target(users / "MNIST/raw/train-images-idx3-ubyte", data("mnist", "flat"), False),
        "MNIST labels": Target(users / "MNIST/raw/train-labels-idx1-ubyte", data("mnist", "flat"), False),
        "CIFAR": Target(users / "cifar-10-batches-py/data_batch_1", data("cifar10", "flat"), False),
    }
    images = sorted(
        path for path in users.iterdir() if path.suffix in (".png", ".jpg", ".gif", ".bmp", ".ppm", ".pgm", ".tiff", ".webp")
    )
    return {**targets, **{f"image {path.name}": Target(path, image(path), False) for path in images}}


class Trials:
    """Damages files in forks of this process, and keeps count.

    Args:
        folder: Folder with everything that is damaged and read.
        seed: Seed of all damage.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.canary = folder / "canary"
        self.targets = reads_of(folder)
        self.originals = {name: target.path.read_bytes() for name, target in self.targets.items()}
        # Not the journals: an older one in the place of the last is how to go back to it.
        others = [content for name, content in self.originals.items() if "journal" not in name]
        self.mutator = Mutator(self.canary, others)
        self.expected = {name: target.read() if target.is_ours else None for name, target in self.targets.items()}
        self._shared = mmap.mmap(-1, mmap.PAGESIZE)  # number of the file that a fork is at
        self.counts = dict.fromkeys(("noticed", "same", "read", "memory", "failed"), 0)
        self.table: dict[str, dict[str, int]] = {}
        self.failed: list[str] = []

    def damaged(self, name: str, number: int) -> tuple[str, bytes, random.Random]:
        """Return kind and content of a target's damage with this number."""
        chance = random.Random(f"{self.seed} {name} {number}")
        target, original = self.targets[name], self.originals[name]
        if target.edits is not None and (not target.is_ours or chance.random() < 0.3):
            while (content := target.edits(original, chance)) == original:
                pass
            return "sealed", content, chance
        return *self.mutator.mutate(original, chance), chance

    def read_one(self, name: str, number: int) -> tuple[str, str]:
        """Damage a target and read it; return what came of it, and what was wrong."""
        target = self.targets[name]
        kind, content, _ = self.damaged(name, number)
        target.path.write_bytes(content)
        try:
            found = target.read()
        except LowMemError as error:
            text = str(error)
            return ("noticed", "") if "\n" not in text and text else ("failed", f"{kind}: message {text!r}")
        except MemoryError:
            return "memory", ""
        except Exception as error:
            return "failed", f"{kind}: {type(error).__name__}: {str(error)[:200]!r}"
        if not target.is_ours or kind == "sealed":
            return "read", ""
        is_same = repr(found) == repr(self.expected[name])
        return ("same", "") if is_same else ("failed", f"{kind}: read with another content")

    def run_readings(self, total: int) -> None:
        """Damage and read `total` files, equally many of each target."""
        for place, name in enumerate(self.targets):
            number, stop = 0, total * (place + 1) // len(self.targets) - total * place // len(self.targets)
            while number < stop:
                number = self._run_chunk(name, number, min(stop, number + _CHUNK))
            self.targets[name].path.write_bytes(self.originals[name])

    def note(self, name: str, outcome: str, wrong: str) -> None:
        """Count what came of a damaged file."""
        self.counts[outcome] += 1
        row = self.table.setdefault(name, {})
        row[outcome] = row.get(outcome, 0) + 1
        if wrong:
            self.failed.append(f"{name}: {wrong}")
            print(self.failed[-1], file=sys.stderr, flush=True)

    def _run_chunk(self, name: str, number: int, stop: int) -> int:
        """Read some damaged files in a fork; return the number of the next one."""
        before = self.world(self.targets[name].path)
        outcomes, log = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(outcomes)
            self._be_bounded()
            with os.fdopen(log, "w") as file:
                for this in range(number, stop):
                    self._shared[:8] = this.to_bytes(8, "little")
                    signal.setitimer(signal.ITIMER_REAL, SECONDS)
                    file.write(json.dumps(self.read_one(name, this)) + "\n")
                    file.flush()
            os._exit(0)
        os.close(log)
        with os.fdopen(outcomes) as file:
            for line in file:
                outcome, wrong = json.loads(line)
                self.note(name, outcome, wrong and f"number {number}, {wrong}")
                number += 1
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            at = int.from_bytes(self._shared[:8], "little")
            how = "hangs" if code == -signal.SIGALRM else f"ends the process with {code}"
            self.note(name, "failed", f"number {at}, {self.damaged(name, at)[0]}: {how}")
            number = at + 1
        if changed := self.changes(before, self.targets[name].path):
            self.note(name, "failed", f"before number {number}: changed {changed}")
        return number

    def _be_bounded(self) -> None:
        """Bound this fork's memory."""
        gc.disable()
        held = 1024 * int(
            next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData")).split()[1]
        )
        resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY_BYTES, held + MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        self.take_the_network()

    @staticmethod
    def take_the_network() -> None:
        """Have nothing in this process find a network."""

        def refuse(*_: object, **__: object) -> None:
            raise OSError("there is no network here")

        socket.socket.connect = refuse  # type: ignore[method-assign]
        socket.getaddrinfo = refuse  # type: ignore[assignment]

    def world(self, own: Path) -> dict[str, tuple[int, int]]:
        """Return sizes and times of all files that the reading of a file may not change: all but its own, and locks."""
        return {
            str(path.relative_to(self.folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in self.folder.rglob("*")
            if path != own and path.name != "lock" and not path.is_dir()
        }

    def changes(self, before: dict[str, tuple[int, int]], own: Path) -> list[str]:
        """Return what has changed since then; the canary too, where code has run."""
        after = self.world(own)
        changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
        self.canary.unlink(missing_ok=True)
        return changed


def main() -> None:
    """Run the trials."""
    folder, form, count, seed = Path(sys.argv[1]).absolute(), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.process_time()
    pid = os.fork()  # threads of a training that was here would be missing in later forks
    if pid == 0:
        code = 1
        try:
            make_runs(folder)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0, "the runs cannot be made"
    make_users_files(folder / "users")
    gc.freeze()
    trials = Trials(folder, seed)
    if not form.isdecimal():
        kind, content, _ = trials.damaged(form, count)
        trials.targets[form].path.write_bytes(content)
        print(kind, len(content), content[:300])
        trials.targets[form].read()
        return
    trials.run_readings(int(form))
    run_commands(trials, count)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = round(time.process_time() - began + usage.ru_utime + usage.ru_stime)
    print(
        json.dumps(
            {"trials": int(form) + count, **trials.counts, "failed": trials.failed, "cpu_seconds": seconds, "table": trials.table}
        )
    )


if __name__ == "__main__":
    main()
