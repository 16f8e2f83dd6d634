"""Small trainings, one for each way in which a run can be in the middle of something, in forks of a process that has imported everything.

A training here is as small as it can be while it has its features, and the trials resume it hundreds of times. So what a run computes
before it trains, and always computes the same, is computed once: the costs of the model's layers.
"""

import gc
import json
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch

# Not used here: what a run imports on its way, so that its forks need not.
import torch._dynamo
from torch import nn

import lowmem_pnn
from helpers import small_networks as networks
from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.planning import batch_plan
from lowmem_pnn.profiling.costs import MemoryProfile
from lowmem_pnn.stores import disk
from lowmem_pnn.training import setup, start
from lowmem_pnn.workload import Workload

_COMMON = {"max_gpu_mem": "150MB", "optimizer": "adamw", "commit_every": 0.0, "device": "cpu", "batch_size": 8, "epochs": 1}


@dataclass(frozen=True)
class Training:
    """A training that is tried.

    Args:
        features: what it has, in words.
        build: builds its model.
        data: gives so many of its samples, by a seed.
        options: of `lowmem_pnn.fit`, beside those that all have: a commit after every batch, tiny batches.
        stays: whether weights and optimizer state of sweeps stay in memory from batch to batch, as there is room for them.
    """

    features: str
    build: Callable[[], nn.Module]
    data: Callable[..., networks.Data]
    options: dict[str, Any] = field(default_factory=dict)
    stays: bool = False

    def run(self, path: Path, *, resume: bool = False, **options: Any) -> None:
        """Begin, or go on.

        Args:
            path: folder of the run.
            resume: whether to go on.
            **options: of `lowmem_pnn.fit`.
        """
        given = {**_COMMON, **self.options, **options}
        with nullcontext() if self.stays else mock.patch.object(batch_plan, "with_resident_state", lambda request, plan: plan):
            # 3 batches, of which the last is short; a validation split of 2.
            lowmem_pnn.fit(self.build, self.data(22), test=self.data(9, seed=1), workdir=path, resume=resume, **given)

    def finish(self, path: Path) -> None:
        """Go on, or begin where there is no run yet."""
        try:
            self.run(path, resume=True)
        except CheckpointError as error:
            if "holds no run" not in str(error):
                raise
            self.run(path)


def _tied_gpt() -> nn.Module:
    return networks.small_gpt(tied=True)


def _floats() -> nn.Module:
    return networks.Floats(4)


def _floats_data(num_samples: int, seed: int = 0) -> networks.Data:
    return networks.vectors(num_samples, 64, seed=seed)


def _wide_data(num_samples: int, seed: int = 0) -> networks.Data:
    return networks.vectors(num_samples, 96, seed=seed)


TRAININGS = {
    "pnn": Training(
        "an epoch, then two, keep_commits 3", networks.small_mlp, networks.vectors, {"epochs": (1, 2), "cuts": "1", "keep_commits": 3}
    ),
    "pnn, recovery": Training(
        "BatchNorm, Dropout, activations in int8, two recovery epochs",
        networks.small_conv,
        networks.images,
        {"cuts": "2", "recovery_epochs": 2, "sil_target": "pooled", "activation_dtype": "int8"},
    ),
    "pnn, parallel labels": Training(
        "partitions on labels alone, int8 state", networks.wide_mlp, _wide_data,
        {"cuts": "2,4", "parallel_sil": True, "optimizer_state": "int8"},
    ),
    "exact": Training(
        "BatchNorm, Dropout, clipping, keep_commits 2", networks.small_conv, networks.images,
        {"method": "exact", "cuts": "1,2", "clip_norm": 0.5, "keep_commits": 2},
    ),
    "exact, resident": Training(
        "weights and state stay in memory, keep_commits 2", networks.small_conv, networks.images,
        {"method": "exact", "cuts": "1,2", "keep_commits": 2}, stays=True,
    ),
    "exact, tied": Training(
        "weights tied across partitions, bf16", _tied_gpt, networks.tokens,
        {"method": "exact", "cuts": "1,2", "precision": "bf16", "compare": False},
    ),
    "exact, fp16": Training(
        "loss scale that falls", _floats, _floats_data,
        {"method": "exact", "cuts": "1,2", "precision": "fp16"},
    ),
    "neuroflux": Training(
        "sequential, two views", networks.conv_layers, networks.images,
        {"method": "neuroflux", "cuts": "2", "views": 2, "augment": "basic"},
    ),
    "neuroflux, interleaved": Training(
        "three macro-batches, clipping, bf16", networks.conv_layers, networks.images,
        {"method": "neuroflux", "cuts": "1,2", "visits": "interleaved", "macro_batches": 3, "clip_norm": 0.5, "precision": "bf16"},
    ),
    "neuroflux, laps": Training(
        "two laps, keep_commits 2", networks.conv_layers, networks.images,
        {"method": "neuroflux", "cuts": "2", "visits": "laps=2", "epochs": 2, "keep_commits": 2},
    ),
    "incubate": Training(
        "a meta model, BatchNorm, Dropout, two views, a recovery epoch", networks.small_conv, networks.images,
        {"method": "incubate", "cuts": "2", "views": 2, "augment": "basic", "recovery_epochs": 1},
    ),
    "backprop": Training(
        "sgd with momentum, cosine, fp16, tied weights", _tied_gpt, networks.tokens,
        {"method": "backprop", "optimizer": "sgd", "lr_schedule": "cosine", "precision": "fp16"},
    ),
}  # fmt: skip
"""Trainings by name."""


def in_child(work: Callable[[], None], note: Callable[[str], None] = lambda text: None) -> int:
    """Run in a forked process.

    Args:
        work: what is done there.
        note: called there with the traceback of what it raises.

    Returns:
        The exit status as `os.waitstatus_to_exitcode` gives it: 1 where it raised.
    """
    return wait_for(start_child(work, note))


def start_child(work: Callable[[], None], note: Callable[[str], None] = lambda text: None) -> int:
    """Start what `in_child` runs; its process id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            work()
            code = 0
        except BaseException:
            note(traceback.format_exc())
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def wait_for(pid: int) -> int:
    """Wait for a child, and return its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_after(seconds: float, work: Callable[[Callable[[], None]], None]) -> int:
    """Run in a forked process, and kill it.

    Args:
        seconds: time from when `work` says that it has begun.
        work: what is done there, with the function that says it.

    Returns:
        The exit status.
    """
    reader, writer = os.pipe()
    pid = start_child(lambda: work(lambda: os.close(writer)))
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return wait_for(pid)


class _Prepared(Exception):
    """Model and data are open, and the run is about to be created."""


def prepare(training: Training) -> None:
    """Compute, once for all trials of a training, what every run of it computes before it trains: its layers, and what they need.

    Args:
        training: what is trained by this process's children from now on.
    """
    workloads: list[Workload] = []
    profiles: list[MemoryProfile] = []

    def make(*arguments: Any) -> Workload:
        workloads.append(_make_workload(*arguments))
        return workloads[-1]

    def profile(*arguments: Any) -> MemoryProfile:
        profiles.append(_profile_workload(*arguments))
        return profiles[-1]

    def stop(*_: Any) -> NoReturn:
        raise _Prepared

    check_disk = start.check_disk
    setup.make_workload, start.profile_workload, start.check_disk = make, profile, stop
    torch.set_num_threads(1)
    start.warm_up_profiler = lambda: None
    with suppress(_Prepared):
        training.run(Path("not made"))
    (workload,), (costs,) = workloads, profiles
    setup.make_workload, start.profile_workload, start.check_disk = lambda *_: workload, lambda *_: costs, check_disk
    # What is there now is no garbage of a fork: looking through it there would copy it.
    gc.collect()
    gc.freeze()


@dataclass
class Reference:
    """A run that was left alone.

    Args:
        path: its folder.
        points: names of the commit points that it went through.
        seconds: time from when its training began to its end.
    """

    path: Path
    points: list[str]
    seconds: float


def run_reference(training: Training, path: Path) -> Reference:
    """Run a training that is left alone.

    Args:
        training: what is trained, prepared.
        path: folder of the run.
    """
    log = path.with_suffix(".log")

    def work() -> None:
        points: list[str] = []
        began: list[float] = []
        disk.commit_point = points.append
        when_training_begins(lambda: began.append(time.monotonic()))
        training.run(path)
        log.write_text(json.dumps([points, time.monotonic() - began[0]]))

    assert in_child(work) == 0, "the run that is left alone fails"
    return Reference(path, *json.loads(log.read_text()))


def when_training_begins(act: Callable[[], None]) -> None:
    """Have something done, in this process, when a run is there and is brought to its end."""
    run_to_end = start.run_to_end

    def begin(*arguments: Any) -> Any:
        act()
        return run_to_end(*arguments)

    start.run_to_end = begin


def differences(path: Path, reference: Path) -> list[str]:
    """Return in what a run differs from the one that was left alone, in words: weights, scores, metrics, files."""
    names = [{entry.name for entry in run.iterdir()} for run in (path, reference)]
    found = [f"{name} is not in both" for name in sorted(names[0] ^ names[1])]
    for name in ("model.safetensors", "heads.safetensors"):
        if name in names[0] & names[1] and (path / name).read_bytes() != (reference / name).read_bytes():
            found.append(f"{name} differs")
    if not {"result.json", "metrics.jsonl"} <= names[0] & names[1]:
        return found
    first, second = (json.loads((run / "result.json").read_text()) for run in (path, reference))
    for result in (first, second):
        for exit_ in result["exits"]:
            del exit_["samples_per_second"]
    scores = ("test_accuracy", "test_loss", "train_loss", "val_loss", "exits", "macs")
    found += [f"{key} is {first[key]}, not {second[key]}" for key in scores if first[key] != second[key]]
    lines = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (path, reference)]
    kept = [[{key: line.get(key) for key in ("action", "visit", "epoch", "train_loss", "macs")} for line in log] for log in lines]
    if kept[0] != kept[1]:
        found.append("metrics.jsonl differs")
    return found


_make_workload, _profile_workload = setup.make_workload, start.profile_workload
