"""The trainings of `ahead.py`: each in a process of its own, stopped and gone on with at will, its outcome kept.

python bench/ahead_runs.py TRAINING.json   # one training, as `ahead.py` runs it: exit code 75 where its time is over
"""

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parent / ".cache" / "ahead"
TIME_IS_OVER = 75


@dataclass(frozen=True)
class Setting:
    """What is trained on what.

    Args:
        name: of the setting.
        model: a name as `--model` takes it.
        data: a name as `--data` takes it.
        budget: of device memory, the same for every contender.
        cuts: as `--cuts` takes them, for contenders that are cut.
        options: fields of `FitConfig` that all contenders have.
        batch: samples of a step.
        measure: what is judged: accuracy in percent, or the loss where that is less.
    """

    name: str
    model: str
    data: str
    budget: str
    cuts: str
    batch: int
    options: tuple[tuple[str, Any], ...] = ()
    measure: str = "accuracy"


@dataclass(frozen=True)
class Training:
    """One training.

    Args:
        setting: what is trained on what.
        options: fields of `FitConfig`, beside those of the setting.
        seed: of the run.
        is_trial: whether it is measured on a tenth of the training data, to choose options by; else after every epoch on the test data,
            by which nothing is chosen.
    """

    setting: Setting
    options: tuple[tuple[str, Any], ...]
    seed: int = 0
    is_trial: bool = False

    @property
    def fields(self) -> dict[str, Any]:
        """All fields of `FitConfig` but the data's."""
        setting = self.setting
        given = {
            "batch_size": setting.batch,
            "cuts": setting.cuts,
            "lr_schedule": "cosine",
            **dict(setting.options),
            **dict(self.options),
        }
        if given["method"] == "backprop":
            del given["cuts"]
        return {**given, "max_gpu_mem": setting.budget, "seed": self.seed, "device": "cpu", "log_every": 10**9}

    @property
    def key(self) -> str:
        """A name that follows from everything that the outcome does."""
        setting = self.setting
        data = Path(setting.data).name
        told = [setting.name, setting.model, data, sorted(self.fields.items()), self.is_trial, version("lowmem-pnn")]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:20]

    @property
    def outcome(self) -> dict[str, Any] | None:
        """What it came to; None where it has not ended yet."""
        path = CACHE / f"{self.key}.json"
        return json.loads(path.read_text()) if path.exists() else None


def run(training: Training, seconds: float) -> bool:
    """Run a training in a process of its own, or go on with it.

    Args:
        training: what is trained.
        seconds: for which it may run.

    Returns:
        Whether it has ended.

    Raises:
        RuntimeError: the process failed.
    """
    folder = CACHE / training.key
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.json").write_text(json.dumps({**dataclasses.asdict(training), "seconds": seconds}))
    process = subprocess.Popen([sys.executable, str(Path(__file__)), str(folder / "training.json")])
    _, status, usage = os.wait4(process.pid, 0)
    code = process.returncode = os.waitstatus_to_exitcode(status)
    spent = folder / "cpu_seconds"
    cpu = (float(spent.read_text()) if spent.exists() else 0.0) + usage.ru_utime + usage.ru_stime
    spent.write_text(str(cpu))
    if code == TIME_IS_OVER:
        return False
    if code:
        raise RuntimeError(f"{training.fields}: exit code {code}; its folder is {folder}")
    outcome = {**json.loads((folder / "outcome.json").read_text()), "cpu_seconds": cpu}
    part = CACHE / f"{training.key}.part"
    part.write_text(json.dumps(outcome))
    part.rename(CACHE / f"{training.key}.json")
    subprocess.run(["rm", "-r", str(folder)], check=True)
    return True


def _train(path: Path) -> int:
    """Train, or go on, in this process; return the exit code."""
    import lowmem_pnn
    from lowmem_pnn.errors import BudgetError, ConfigError, Stopped
    from lowmem_pnn.sources.datasets import find_dataset

    told = json.loads(path.read_text())
    setting = Setting(**{**told["setting"], "options": _pairs(told["setting"]["options"])})
    training = Training(setting, _pairs(told["options"]), told["seed"], told["is_trial"])
    fields = {**training.fields, "time_limit": max(1.0, told["seconds"])}
    workdir = path.parent / "run"
    data: Any = setting.data
    if setting.measure == "accuracy":
        dataset = find_dataset(setting.data, Path("data"), "flat" if setting.model.startswith("mlp:") else "any")
        data, fields["test"] = dataset.train, dataset.test
        fields |= {"val_fraction": 0.1} if training.is_trial else {"val": dataset.test, "val_fraction": 0.0}
    outcome: dict[str, Any] = {"options": dict(training.options), "seed": training.seed, "is_trial": training.is_trial}
    try:
        result = lowmem_pnn.fit(setting.model, data, workdir=workdir, resume=(workdir / "journal.json").exists(), **fields)
    except Stopped:
        return TIME_IS_OVER
    except (BudgetError, ConfigError) as error:
        (path.parent / "outcome.json").write_text(json.dumps({**outcome, "reason": str(error)}))
        return 0
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    outcome |= {name: getattr(result, name) for name in ("seconds", "macs", "peak_bytes", "bytes_written", "bytes_read", "meta")}
    outcome |= {"test": _judged(setting, result.scores["test"]), "val": _judged(setting, result.scores["val"])}
    told_by = "val_accuracy" if setting.measure == "accuracy" else "val_loss"
    last = max((line["partition"] for line in lines if line["action"] == "learn"), default=0)
    # What the last partition is measured with is the model's own only where the partitions before it are as they will stay.
    is_own = fields["method"] != "incubate"
    outcome["curve"] = [
        [line["seconds"], (100 if told_by == "val_accuracy" else 1) * line[told_by]]
        for line in lines
        if line.get(told_by) is not None
        and (line["action"] == "sweep" or (line["action"] == "learn" and is_own and line["partition"] == last))
    ]
    (path.parent / "outcome.json").write_text(json.dumps(outcome))
    return 0


def _judged(setting: Setting, scores: Mapping[str, Any]) -> float:
    return 100 * scores["accuracy"] if setting.measure == "accuracy" else scores["loss"]


def _pairs(given: list[list[Any]]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in given)


def run_all(trainings: list[Training], until: float) -> bool:
    """Run those that have not ended yet, one after the other, until a moment of `time.monotonic`; return whether all have."""
    for number, training in enumerate(trainings, 1):
        if training.outcome is None:
            left = until - time.monotonic()
            if left < 5:
                return False
            words = " ".join(f"{name} {value}" for name, value in training.options)
            print(
                f"{training.setting.name}, {number} of {len(trainings)}: {words}, seed {training.seed}",
                file=sys.stderr,
                flush=True,
            )
            if not run(training, left):
                return False
    return True


def main() -> None:
    """Train what a file names, and exit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("training", type=Path, help="JSON file, as `ahead.py` writes it")
    sys.exit(_train(parser.parse_args().training))


if __name__ == "__main__":
    main()
