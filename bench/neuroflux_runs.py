"""Runs of local learning and of its rivals: what `neuroflux_paper` and `neuroflux_ablation` measure, each run once.

Every contender trains the same network on the same images under the same budget, with SGD, momentum 0.9 and a learning rate that is
proportional to the samples of a step.
"""

import json
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import Cache, arguments_of, last_json, lowmem_pnn, plan_report, run_process

HERE = Path(__file__).parent
MB = 1e6

# The batch of those that can have one of any size, by accumulation.
BATCH = 64
LR = 0.05
MICRO_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)

NEUROFLUX = "neuroflux"
SMALL_BATCH = "backprop, batch that fits"
ACCUMULATION = "backprop, accumulation"
PLAIN = "plain PyTorch, accumulation"
CHECKPOINTING = "plain PyTorch, checkpointing, accumulation"
CLASSIC = "classic local learning"
EXACT = "exact"
CONTENDERS = (NEUROFLUX, SMALL_BATCH, ACCUMULATION, PLAIN, CHECKPOINTING, CLASSIC, EXACT)

OPTIONS: dict[str, dict[str, Any]] = {
    NEUROFLUX: {"method": "neuroflux", "batch_size": "auto"},
    SMALL_BATCH: {"method": "backprop"},
    ACCUMULATION: {"method": "backprop", "batch_size": BATCH},
    CLASSIC: {"method": "neuroflux", "heads": "classic", "partitions": 1, "batch_size": "auto"},
    EXACT: {"method": "exact", "batch_size": BATCH},
}


@dataclass(frozen=True)
class Setting:
    """What is trained on what, for how long.

    Args:
        network: a model's name.
        width: factor of its channels.
        data: a data set's name.
        budget: bytes.
        images: to train on, those to validate on included.
        tests: to test on.
        epochs: of every layer.
        val_fraction: of the images.
        seed: of everything.
    """

    network: str
    width: float
    data: str
    budget: int
    images: int
    tests: int
    epochs: int
    val_fraction: float = 0.0
    seed: int = 0

    @property
    def num_learnt(self) -> int:
        """Images that are trained on."""
        return self.images - math.floor(self.images * self.val_fraction + 0.5)

    def fields(self) -> dict[str, Any]:
        """Fields of `FitConfig`."""
        return {
            "model": self.network,
            "model_arg": {"width": self.width},
            "data": self.data,
            "train_limit": self.images,
            "test_limit": self.tests,
            "epochs": self.epochs,
            "val_fraction": self.val_fraction,
            "optimizer": "sgd",
            "seed": self.seed,
        }


class Runs:
    """Runs by what they are; those that are finished are not run again.

    Args:
        cache: where figures are kept.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    def contender(self, name: str, setting: Setting, round_: int = 0) -> dict[str, Any]:
        """One contender's figures, as `own` and `plain` give them; `reason` alone where it does not fit.

        Args:
            name: one of `CONTENDERS`.
            setting: what is trained.
            round_: repetitions have numbers.
        """
        if name in (PLAIN, CHECKPOINTING):
            return self.plain(setting, name == CHECKPOINTING, round_)
        options = dict(OPTIONS[name])
        if name == SMALL_BATCH:
            found = self.plan(setting, OPTIONS[ACCUMULATION])
            if not found["fits"]:
                return {"reason": found["reason"]}
            options["batch_size"] = found["partitions"][0]["micro_batch"]
        return self.own(setting, options, round_)

    def plan(self, setting: Setting, options: Mapping[str, Any]) -> dict[str, Any]:
        """What `lowmem-pnn plan` says."""
        key = {"plan": setting.network, "width": setting.width, "budget": setting.budget, "images": setting.images, **options}
        return self._cache.get(key, partial(self._plan, setting, options))

    def own(self, setting: Setting, options: Mapping[str, Any], round_: int = 0) -> dict[str, Any]:
        """A run of this package: `learning` and `caching` are seconds, an epoch's and all in all."""
        key = {"run": "own", **setting.__dict__, "data": Path(setting.data).name, "options": dict(options), "round": round_}
        return self._cache.get(key, partial(self._own, setting, options))

    def plain(self, setting: Setting, checkpoints: bool, round_: int = 0) -> dict[str, Any]:
        """A run of plain PyTorch with the largest micro-batch whose peak stays within the budget."""
        probe = {"probe": setting.network, "width": setting.width, "checkpoints": checkpoints}
        sizes = self._cache.get(probe, partial(self._plain, setting, checkpoints, MICRO_BATCHES))["found"]
        fitting = [size["micro_batch"] for size in sizes if size["peak_bytes"] <= setting.budget]
        if not fitting:
            return {"reason": f"not even {MICRO_BATCHES[0]} image at a time"}
        key = {"run": "plain", "checkpoints": checkpoints, **setting.__dict__, "data": Path(setting.data).name, "round": round_}
        (found,) = self._cache.get(key, partial(self._plain, setting, checkpoints, (max(fitting),)))["found"]
        return {
            "learning": found["seconds"],
            "learning_parts": [found["seconds"]],
            "caching": 0.0,
            "peak": found["peak_bytes"],
            "batches": [BATCH],
            "micro_batches": [found["micro_batch"]],
            "cache_bytes": 0,
        }

    def _plan(self, setting: Setting, options: Mapping[str, Any]) -> dict[str, Any]:
        return plan_report({**setting.fields(), **options, "max_gpu_mem": setting.budget, "device": "cpu"})

    def _own(self, setting: Setting, options: Mapping[str, Any]) -> dict[str, Any]:
        if not (report := self.plan(setting, options))["fits"]:
            return {"reason": report["reason"]}
        batches = [part["batch"] for part in report["partitions"]]
        fields = {**setting.fields(), **options, "max_gpu_mem": setting.budget, "device": "cpu"}
        # The rule of `--batch-size auto`, for all: a rate for 64 samples a step.
        fields["lr"] = LR if options["batch_size"] == "auto" else LR * batches[0] / BATCH
        fields |= {"commit_every": 1_000_000, "log_every": 1_000_000}
        with tempfile.TemporaryDirectory() as folder:
            workdir = Path(folder) / "run"
            done = run_process(lowmem_pnn("fit", "--json", "--quiet", "--workdir", str(workdir), *arguments_of(fields)))
            lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        result = json.loads(done.stdout)
        return {
            **times_of(lines, setting.num_learnt, result["seconds"]),
            "process_seconds": done.seconds,
            "peak": result["peak_bytes"],
            "predicted_peak": result["predicted_peak_bytes"],
            "batches": batches,
            "micro_batches": [part["micro_batch"] for part in result["partitions"]],
            "cache_bytes": sum(part["activation_bytes"] for part in report["partitions"]),
            "bytes_read": result["bytes_read"],
            "bytes_written": result["bytes_written"],
            "retries": result["oom_retries"],
            **{name: result[name] for name in ("val_accuracy", "test_accuracy", "exits", "chosen_exit", "macs")},
            "epochs": [line for line in lines if "train_loss" in line],
        }

    def _plain(self, setting: Setting, checkpoints: bool, micro_batches: tuple[int, ...]) -> dict[str, Any]:
        settings = {**setting.fields(), "batch_size": BATCH, "lr": LR, "checkpoints": checkpoints}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "settings.json"
            file.write_text(json.dumps({**settings, "micro_batches": micro_batches}))
            done = run_process([sys.executable, str(HERE / "neuroflux_plain.py"), str(file)])
        return {"found": last_json(done.stdout)}


def times_of(lines: list[dict[str, Any]], num_learnt: int, seconds: float) -> dict[str, Any]:
    """Where the seconds of a run went.

    Args:
        lines: of its `metrics.jsonl`.
        num_learnt: images of an epoch.
        seconds: of the run, from its begin to its result.

    Returns:
        `learning`: an epoch of all partitions, from the last epoch of each, which are `learning_parts`. `caching`: all that blocks
        wrote. `start`: until the first epoch, for profiling, planning and what is checked before training. `rest`. Where blocks take
        turns macro-batch by macro-batch, only whole epochs are known, caching included: `learning` and `seconds` alone.
    """
    epochs = [line for line in lines if "samples_per_second" in line]
    if not epochs:
        ends = list({line["epoch"]: line["seconds"] for line in lines if "train_loss" in line}.values())
        return {
            "learning": (ends[-1] - ends[0]) / max(1, len(ends) - 1),
            "learning_parts": [],
            "caching": None,
            "seconds": seconds,
        }
    last = {line.get("partition", 0): num_learnt / line["samples_per_second"] for line in epochs}
    learnt = sum(num_learnt / line["samples_per_second"] for line in epochs)
    emits = [at for at, line in enumerate(lines) if line["action"] == "emit"]
    caching = sum(lines[at]["seconds"] - lines[at - 1]["seconds"] for at in emits)
    start = epochs[0]["seconds"] - num_learnt / epochs[0]["samples_per_second"]
    return {
        "learning": sum(last.values()),
        "learning_parts": [last[partition] for partition in sorted(last)],
        "caching": caching,
        "start": start,
        "rest": seconds - start - learnt - caching,
        "seconds": seconds,
    }
