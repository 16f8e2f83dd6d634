"""The trainings of `pnn_paper.py`, by figure; each is run once, and its outcome kept."""

import hashlib
import json
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

CACHE = Path(__file__).parent / ".cache" / "pnn_paper"
MODEL = "mlp:784-80-60-60-60-47"
BUDGET = "400MB"
PAPER = {"optimizer": "sgd", "lr": (0.01,), "momentum": 0.9, "batch_size": (1410,)}

TUNED_RUNS = 5
EPOCHS_LEFT, EPOCHS_RIGHT, EPOCHS_WHOLE, EPOCHS_RECOVERY = 5, 160, 40, 10
KAPPA = 10.0
FIGURE_7 = {"N_L": (1, 2, 5, 10, 20, 40), "kappa": (2.0, 10.0)}
FIGURE_8 = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0)

# What the tuned ones are chosen from, on a tenth of the training data.
TUNED_BASELINES: tuple[dict[str, Any], ...] = (
    {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "batch_size": 1410},
    {"optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "batch_size": 256},
    {"optimizer": "adam", "lr": 3e-3, "batch_size": 1410},
    {"optimizer": "adam", "lr": 1e-3, "batch_size": 256},
)
TUNED_PNNS: tuple[dict[str, Any], ...] = (
    {"sil": "sparse", "kappa": 20.0, "lr": (0.02, 0.1), "epochs": (5, 160)},
    {"sil": "sparse", "kappa": 20.0, "lr": (0.02, 0.01), "epochs": (5, 160)},
    {"sil": "sparse", "kappa": 10.0, "lr": (0.1, 0.1), "epochs": (20, 40)},
    {"sil": "uniform", "kappa": 10.0, "lr": (0.05, 0.1), "epochs": (5, 160)},
)


@dataclass(frozen=True)
class Training:
    """One training, and what it is for.

    Args:
        options: fields of `FitConfig`.
        seed: of the run.
        data: a name as `--data` takes it.
        curve: which samples the accuracy after every epoch is of: `test`, or `val`, a tenth of the training data.
    """

    options: tuple[tuple[str, Any], ...]
    seed: int
    data: str
    curve: str = "test"

    @property
    def path(self) -> Path:
        """Where its outcome is kept."""
        from importlib.metadata import version

        told = [sorted(self.options), self.seed, Path(self.data).name, self.curve, version("lowmem-pnn")]
        return CACHE / f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:20]}.json"

    def outcome(self) -> dict[str, Any]:
        """What `train` wrote."""
        found: dict[str, Any] = json.loads(self.path.read_text())
        return found


def train(training: Training) -> None:
    """Run one training in this process, and keep its outcome."""
    import lowmem_pnn
    from lowmem_pnn.sources.datasets import find_dataset

    dataset = find_dataset(training.data, Path("data"), "flat")
    assert dataset.test is not None
    splits = {"test": dataset.test} | ({"val": dataset.test, "val_fraction": 0.0} if training.curve == "test" else {})
    with tempfile.TemporaryDirectory() as folder:
        result = lowmem_pnn.fit(
            MODEL,
            dataset.train,
            max_gpu_mem=BUDGET,
            workdir=f"{folder}/run",
            device="cpu",
            seed=training.seed,
            log_every=10**9,
            **splits,
            **dict(training.options),
        )
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    outcome = {
        "options": dict(training.options),
        "seed": training.seed,
        "data": Path(training.data).name,
        "test_accuracy": 100 * (result.test_accuracy or 0),
        "val_accuracy": 100 * (result.val_accuracy or 0),
        "macs": result.macs,
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "partitions": [{"params": part["params"], "seconds": part["seconds"]} for part in result.partitions],
        "curve": [
            [line["macs"], 100 * line["val_accuracy"], line["action"]] for line in lines if line.get("val_accuracy") is not None
        ],
        "versions": dict(result.versions),
    }
    training.path.parent.mkdir(parents=True, exist_ok=True)
    part = training.path.with_suffix(".part")
    part.write_text(json.dumps(outcome))
    part.rename(training.path)


def train_all(trainings: list[Training], workers: int) -> None:
    """Run those that were not run before, some at a time."""
    missing = [training for training in dict.fromkeys(trainings) if not training.path.exists()]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for number, done in enumerate(as_completed([pool.submit(train, training) for training in missing]), 1):
            done.result()
            print(f"{number} of {len(missing)} trainings", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Study:
    """All trainings of the bench, by figure.

    Args:
        data: a name as `--data` takes it.
        runs: of figures 6 and 10; of the tuned ones at most 5.
        sweep_runs: of figures 7, 8 and 9.
        right: epochs of the right partition.
        short: fewer points in figures 7 and 8.
    """

    data: str
    runs: int
    sweep_runs: int
    right: int
    short: bool

    def baseline(self) -> list[Training]:
        """The paper's: the whole network."""
        return self._seeds({**PAPER, "method": "backprop", "epochs": (EPOCHS_WHOLE,)}, self.runs)

    def recovered(self) -> list[Training]:
        """The paper's PNN, with recovery after it: the curves of figures 6 and 10."""
        return self._seeds({**self._pnn(EPOCHS_LEFT, KAPPA), "recovery_epochs": EPOCHS_RECOVERY}, self.runs)

    def left_epochs(self) -> dict[tuple[float, int], list[Training]]:
        """Figure 7, by kappa and epochs of the left partition."""
        epochs = (1, 5, 20) if self.short else FIGURE_7["N_L"]
        return {
            (float(kappa), int(left)): self._seeds(self._pnn(int(left), kappa), self.sweep_runs)
            for kappa in FIGURE_7["kappa"]
            for left in epochs
        }

    def kappas(self) -> dict[float, list[Training]]:
        """Figure 8."""
        kappas = (2.0, 10.0, 50.0) if self.short else FIGURE_8
        return {kappa: self._seeds(self._pnn(EPOCHS_LEFT, kappa), self.sweep_runs) for kappa in kappas}

    def like_lr(self) -> tuple[list[Training], list[Training]]:
        """Figure 9: kappa 10 with lr 0.01, and kappa 1 with lr 0.1."""
        other = {**self._pnn(EPOCHS_LEFT, 1.0), "lr": (0.1,)}
        return self._seeds(self._pnn(EPOCHS_LEFT, KAPPA), self.sweep_runs), self._seeds(other, self.sweep_runs)

    def candidates(self) -> tuple[list[Training], list[Training]]:
        """What the tuned baseline and the tuned PNN are chosen from; the paper's own settings are among them."""
        schedule = {"lr_schedule": "cosine", "val_fraction": 0.1}
        wholes = [{**PAPER, "lr_schedule": "constant"}, *TUNED_BASELINES]
        baselines = [{**schedule, **options, "method": "backprop", "epochs": (EPOCHS_WHOLE,)} for options in wholes]
        pnns = [
            {**self._pnn(EPOCHS_LEFT, KAPPA), "val_fraction": 0.1},
            *({**self._pnn(EPOCHS_LEFT, KAPPA), **schedule, **options} for options in TUNED_PNNS),
        ]
        taken = slice(0, 2 if self.short else None)
        return (
            [self._seeds(options, 1, curve="val")[0] for options in baselines[taken]],
            [self._seeds(options, 1, curve="val")[0] for options in pnns[taken]],
        )

    def tuned(self, chosen: Training, recovery: bool = False) -> list[Training]:
        """A chosen candidate, trained on all training data."""
        options = {name: value for name, value in chosen.options if name != "val_fraction"}
        return self._seeds({**options, **({"recovery_epochs": EPOCHS_RECOVERY} if recovery else {})}, min(self.runs, TUNED_RUNS))

    def _pnn(self, left: int, kappa: float) -> dict[str, Any]:
        return {**PAPER, "method": "pnn", "cuts": "2", "shuffle": (False, True), "epochs": (left, self.right), "kappa": kappa}

    def _seeds(self, options: dict[str, Any], runs: int, curve: str = "test") -> list[Training]:
        one = Training(tuple(sorted(options.items())), 0, self.data, curve)
        return [replace(one, seed=seed) for seed in range(runs)]


def mean_and_deviation(trainings: list[Training]) -> tuple[float, float]:
    """Of the test accuracies at the end, in percent."""
    values = [training.outcome()["test_accuracy"] for training in trainings]
    return statistics.mean(values), statistics.pstdev(values)


def mean_curve(trainings: list[Training], *actions: str) -> tuple[list[float], list[float], list[float]]:
    """MACs, mean accuracy and its deviation after every epoch of some actions, over several runs."""
    curves = [[point for point in training.outcome()["curve"] if point[2] in actions] for training in trainings]
    macs = [point[0] for point in curves[0]]
    columns = list(zip(*[[point[1] for point in curve] for curve in curves], strict=True))
    return macs, [statistics.mean(column) for column in columns], [statistics.pstdev(column) for column in columns]


def r_squared(one: list[float], other: list[float]) -> float:
    """How much of one curve's variance the other explains."""
    mean = statistics.mean(one)
    rest = sum((a - b) ** 2 for a, b in zip(one, other, strict=True))
    return 1 - rest / sum((a - mean) ** 2 for a in one)


def best(candidates: list[Training]) -> Training:
    """By accuracy on the validation part."""
    return max(candidates, key=lambda training: training.outcome()["val_accuracy"])
