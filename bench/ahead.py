"""Partition-wise training beside end-to-end training, in one budget of memory: accuracy, time, peak, bytes written.

Contenders: backprop with accumulation, the same with checkpointing, exact, pnn, neuroflux, incubate. Those that learn otherwise than the
others are tuned on a tenth of the training data with the same number of trials each, and the best of each is trained with several seeds on all
of it. `exact` learns what backprop learns, by the same options, and so does checkpointing: one training shows the first, and the
second is timed alone (`lowmem-pnn bench`). Curves are test accuracy, by which nothing is chosen.

    python bench/ahead.py --short                              # a subset of EMNIST, one seed, nothing tuned: a minute or two
    python bench/ahead.py [--settings emnist,...] [--seeds 3] [--trials 3] [--minutes 60]
    python bench/ahead.py --page                               # the page of what has been run

Runs stop after --minutes, in the midst of a training too, and the same command goes on. Finished trainings are kept in
bench/.cache/ahead. The page is written whenever the bench ends, with what was run and what was not. Seconds are those of the processor (user and
system), since other programs may run beside; a curve's are its run's clock, stretched to end there.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from ahead_runs import Setting, Training, run_all
from common import (
    RESULTS,
    Cache,
    default_cifar10,
    default_emnist,
    emnist_in_words,
    find_text,
    last_json,
    lowmem_pnn,
    markdown_table,
    run_process,
    write_results,
)

NETWORKS = Path(__file__).parent / "networks.py"
PAPER = "mlp:784-80-60-60-60-47"
IMAGES = (("augment", "basic"), ("weight_decay", 5e-4))
SGD: dict[str, Any] = {"optimizer": "sgd"}

# What each contender is chosen from, the most promising first; of all of them as many are tried.
MLP_TRIALS: dict[str, tuple[dict[str, Any], ...]] = {
    "backprop": (
        {**SGD, "epochs": 40, "lr": 0.1},
        {**SGD, "epochs": 40, "lr": 0.2},
        {**SGD, "epochs": 40, "lr": 0.05},
    ),
    "pnn": (
        {**SGD, "epochs": (5, 160), "lr": (0.02, 0.1), "batch_size": 1410, "sil": "sparse", "kappa": 20.0, "recovery_epochs": 10},
        {**SGD, "epochs": (20, 40), "lr": (0.1, 0.1), "batch_size": 1410, "sil": "sparse", "kappa": 10.0, "recovery_epochs": 20},
        {**SGD, "epochs": (5, 40), "lr": (0.02, 0.1), "batch_size": 256, "sil": "sparse", "kappa": 20.0, "recovery_epochs": 10},
    ),
    "neuroflux": (
        {**SGD, "epochs": 40, "lr": 0.1},
        {**SGD, "epochs": 40, "lr": 0.1, "local_loss": "both"},
        {**SGD, "epochs": 40, "lr": 0.05, "local_loss": "similarity"},
    ),
    "incubate": (
        {**SGD, "epochs": 15, "meta_epochs": 10, "recovery_epochs": 15, "lr": 0.1},
        {**SGD, "epochs": 10, "meta_epochs": 5, "recovery_epochs": 20, "lr": 0.1},
        {**SGD, "epochs": 25, "meta_epochs": 15, "recovery_epochs": 5, "lr": 0.1},
    ),
}
IMAGE_TRIALS: dict[str, tuple[dict[str, Any], ...]] = {
    "backprop": tuple({**SGD, "epochs": 100, "lr": lr} for lr in (0.1, 0.2, 0.05)),
    "pnn": tuple(
        {**SGD, "epochs": (20, 80), "lr": lr, "sil_target": "pooled", "sil": "sparse", "kappa": kappa, "recovery_epochs": 20}
        for lr, kappa in ((0.05, 5.0), (0.1, 5.0), (0.05, 1.0))
    ),
    "neuroflux": (
        {**SGD, "epochs": 100, "lr": 0.1, "views": 4},
        {**SGD, "epochs": 100, "lr": 0.1, "views": 4, "local_loss": "both"},
        {**SGD, "epochs": 100, "lr": 0.1, "visits": "interleaved"},
    ),
    "incubate": tuple(
        {**SGD, "epochs": epochs, "meta_epochs": meta, "recovery_epochs": recovery, "lr": 0.1, "views": 4}
        for epochs, meta, recovery in ((50, 25, 25), (30, 20, 40), (60, 40, 10))
    ),
}
TEXT_TRIALS: dict[str, tuple[dict[str, Any], ...]] = {
    "backprop": tuple({"epochs": 4, "lr": lr} for lr in (1e-3, 2e-3, 5e-4)),
    "pnn": ({"epochs": 4},),
    "neuroflux": tuple({"epochs": 4, "lr": lr} for lr in (1e-3, 2e-3, 5e-4)),
    "incubate": tuple({"epochs": 2, "meta_epochs": 1, "recovery_epochs": recovery, "lr": 1e-3} for recovery in (1, 2, 3)),
}
# Fewer samples take more epochs, and smaller batches where labels are regressed to.
FEW_TRIALS = {
    **MLP_TRIALS,
    "pnn": (
        {**SGD, "epochs": (20, 80), "lr": (0.02, 0.1), "sil": "sparse", "kappa": 20.0, "recovery_epochs": 10},
        {**SGD, "epochs": (20, 40), "lr": (0.1, 0.1), "sil": "sparse", "kappa": 5.0, "recovery_epochs": 20},
        {**SGD, "epochs": (40, 40), "lr": (0.02, 0.1), "sil": "sparse", "kappa": 10.0, "recovery_epochs": 20},
    ),
}
TRIALS = {"emnist": MLP_TRIALS, "emnist-few": FEW_TRIALS, "emnist-short": FEW_TRIALS, "text": TEXT_TRIALS}
# What to doubt of a setting.
NOTES = {
    "emnist-few": (
        "What to doubt: few images, on which backprop overfits, and few trials, some of which stand at an edge of what was tried. Ahead is "
        "who ends later, not who has the same time. The network is so small that the budget binds nobody: buffers of fixed size are most "
        "of every peak, and what partitions save does not show."
    ),
}
METHODS = ("backprop", "incubate", "pnn", "neuroflux")


def settings() -> dict[str, Setting]:
    """All settings by name, in the order in which they are run."""
    emnist, cifar = default_emnist(), default_cifar10()
    fashion = cifar.replace("cifar10", "fashion-mnist")
    text, _ = find_text(None)
    found = [
        Setting("emnist-short", PAPER, emnist, "60MB", "2", 256, (("train_limit", 4000), ("test_limit", 2000))),
        Setting("emnist-few", PAPER, emnist, "60MB", "2", 256, (("train_limit", 12000),)),
        Setting("emnist", PAPER, emnist, "60MB", "2", 256),
        Setting(
            "cifar10-resnet20", f"{NETWORKS}:resnet", cifar, "150MB", "block3,block6", 128, (*IMAGES, ("model_arg", {"width": 8}))
        ),
        Setting("fashion-vgg11", "cifar-vgg11", fashion, "150MB", "3,5", 128, (*IMAGES, ("model_arg", {"width": 0.25}))),
        Setting(
            "cifar10-resnet32",
            f"{NETWORKS}:resnet",
            cifar,
            "150MB",
            "block4,block9",
            128,
            (*IMAGES, ("model_arg", {"depth": 32, "width": 8})),
        ),
        Setting(
            "text",
            "gpt:layers=4,width=128,heads=4,context=128,tied=false",
            f"text:{text}",
            "200MB",
            "blocks.2.attention",
            64,
            (("optimizer", "adamw"),),
            "loss",
        ),
    ]
    return {setting.name: setting for setting in found}


class Study:
    """The trainings of one setting.

    Args:
        setting: what is trained on what.
        trials: options that each contender is chosen from.
        seeds: trainings of each chosen one.
    """

    def __init__(self, setting: Setting, trials: int, seeds: int) -> None:
        self.setting, self.seeds = setting, seeds
        table = TRIALS.get(setting.name, IMAGE_TRIALS)
        self.trials = {
            method: [
                Training(setting, tuple({"method": method, **options}.items()), is_trial=True)
                for options in table[method][:trials]
            ]
            for method in METHODS
        }

    def chosen(self, method: str) -> Training | None:
        """The trial that was best on validation data; None where they have not all ended, or none could be run.

        A single one needs no trial.
        """
        if len(self.trials[method]) == 1:
            return self.trials[method][0]
        outcomes = [(trial, trial.outcome) for trial in self.trials[method]]
        if any(outcome is None for _, outcome in outcomes):
            return None
        ended = [(trial, outcome["val"]) for trial, outcome in outcomes if outcome is not None and "val" in outcome]
        better = max if self.setting.measure == "accuracy" else min
        return better(ended, key=lambda pair: pair[1])[0] if ended else None

    def finals(self, method: str) -> list[Training]:
        """The trainings of a contender with all training data, as far as it is known by which options."""
        chosen = self.chosen("backprop" if method == "exact" else method)
        if chosen is None:
            return []
        options = {**dict(chosen.options), "method": method}
        return [Training(self.setting, tuple(options.items()), seed) for seed in range(1 if method == "exact" else self.seeds)]

    def run(self, until: float) -> bool:
        """Run what is left; return whether all of it has ended."""
        for method in METHODS:
            trials = self.trials[method] if len(self.trials[method]) > 1 else []
            if not (run_all(trials, until) and run_all(self.finals(method), until)):
                return False
        return run_all(self.finals("exact"), until)

    def rows(self) -> list[dict[str, Any]]:
        """What is known of each contender, backprop first."""
        found = []
        for method in (*METHODS[:1], "exact", *METHODS[1:]):
            outcomes = [outcome for training in self.finals(method) if (outcome := training.outcome) is not None]
            trials = [outcome for trial in self.trials.get(method, []) if (outcome := trial.outcome) is not None]
            reason = next((outcome["reason"] for outcome in (*outcomes, *trials) if "reason" in outcome), "")
            ended = [outcome for outcome in outcomes if "test" in outcome]
            found.append({"method": method, "outcomes": ended, "reason": "" if ended else reason, "trials": trials})
        return found


def page(study: Study, checkpointing: dict[str, Any] | None) -> str:
    """The section of a setting: its table, and what follows from it."""
    setting, rows = study.setting, study.rows()
    sign, unit = (1, "%") if setting.measure == "accuracy" else (-1, "")
    base = next(row for row in rows if row["method"] == "backprop")["outcomes"]
    table, verdicts = [], []
    least = min((statistics.mean(seconds(one) for one in row["outcomes"]) for row in rows if row["outcomes"]), default=0.0)
    for row in rows:
        outcomes = row["outcomes"]
        if not outcomes:
            table.append([row["method"], row["reason"] or "not run yet", *[""] * 8])
            continue
        scores = [one["test"] for one in outcomes]
        options = ", ".join(
            f"{name} {value}" for name, value in outcomes[0]["options"].items() if name not in ("method", "optimizer")
        )
        # Read off curves that end later: a schedule that is cut short would do better.
        then = [score for one in outcomes if (score := at_time(one, least)) is not None]
        table.append(
            [
                row["method"],
                f"{statistics.mean(scores):.2f}",
                f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "-",
                str(len(scores)),
                f"{statistics.mean(then):.2f}" if len(then) == len(scores) else "-",
                gained(outcomes),
                f"{statistics.mean(seconds(one) for one in outcomes):.0f}",
                f"{max(one['peak_bytes'] for one in outcomes) / 1e6:.1f}",
                f"{statistics.mean(one['bytes_written'] for one in outcomes) / 1e6:.0f}",
                options,
            ]
        )
        if base and row["method"] not in ("backprop", "exact") and min(len(scores), len(base)) > 1:
            verdicts.append(verdict(row["method"], scores, [one["test"] for one in base], sign))
    if checkpointing is not None and base:
        ratio = checkpointing["plain"] / checkpointing["checkpointing"]
        first = next(cells for cells in table if cells[0] == "backprop")
        took = statistics.mean(seconds(one) for one in base) * ratio
        peak = f"{checkpointing['peak_bytes'] / 1e6:.1f}"
        table.insert(
            1,
            ["backprop, checkpointing", *first[1:4], "-", first[5], f"{took:.0f}", peak, "0", "as backprop: timed, not trained"],
        )
    heads = [
        "contender", f"test {setting.measure} {unit}".strip(), "deviation", "seeds", f"after {least:.0f} s", "gain of last quarter", "CPU s",
        "peak MB", "written MB", "options",
    ]  # fmt: skip
    tried = [
        [
            row["method"],
            ", ".join(f"{name} {value}" for name, value in one["options"].items() if name != "method"),
            f"{one['val']:.2f}",
        ]
        for row in rows
        for one in row["trials"]
        if "val" in one
    ]
    parts = [
        f"## {setting.name}\n\n`{Path(setting.model).name if '/' in setting.model else setting.model}`, {setting.budget} of device memory for "
        f"each, batch {setting.batch}, cuts before layers {setting.cuts}"
        + "".join(f", {name} {value}" for name, value in setting.options)
        + ".",
        markdown_table(heads, table),
        NOTES.get(setting.name, ""),
        "\n".join(verdicts),
        "Chosen on a tenth of the training data, one run each:" if tried else "",
        markdown_table(["contender", "options", f"validation {setting.measure}"], tried) if tried else "",
    ]
    return "\n\n".join(part for part in parts if part)


def verdict(method: str, scores: list[float], base: list[float], sign: int) -> str:
    """Say where a contender is beside backprop, in points and in deviations."""
    difference = sign * (statistics.mean(scores) - statistics.mean(base))
    spread = (statistics.stdev(scores) ** 2 + statistics.stdev(base) ** 2) ** 0.5
    where = "ahead of" if difference > 0 else "behind"
    is_clear = abs(difference) > 2 * spread
    return (
        f"- `{method}` is {abs(difference):.2f} {where} backprop, "
        + (f"{abs(difference) / spread:.1f} deviations of the difference" if spread else "without a deviation")
        + ("" if is_clear else ": no more than chance may do")
        + "."
    )


def seconds(outcome: dict[str, Any]) -> float:
    """CPU seconds of a training."""
    found: float = outcome["cpu_seconds"]
    return found


def at_time(outcome: dict[str, Any], moment: float) -> float | None:
    """The last point of a curve at or before a moment, in CPU seconds; None where there is none."""
    points = [score for at, score in curve(outcome) if at <= 1.02 * moment]
    return points[-1] if points else None


def curve(outcome: dict[str, Any]) -> list[tuple[float, float]]:
    """Points of CPU seconds and test accuracy: the run's own clock, stretched to end with the CPU seconds of its process."""
    stretch = outcome["cpu_seconds"] / max(outcome["seconds"], 1e-9)
    return [*((at * stretch, score) for at, score in outcome["curve"]), (outcome["cpu_seconds"], outcome["test"])]


def gained(outcomes: list[dict[str, Any]]) -> str:
    """Points gained in the last quarter of the curves' own length: converged is what gains less than 0.3."""
    gains = []
    for outcome in outcomes:
        points = outcome["curve"]
        if len(points) < 4:
            return "-"
        gains.append(points[-1][1] - points[-1 - len(points) // 4][1])
    return f"{statistics.mean(gains):+.2f}"


def picture(study: Study) -> str | None:
    """Draw the curves of a setting, where there is matplotlib; return the file's name."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not any(row["outcomes"] for row in study.rows()):
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in study.rows():
        for number, outcome in enumerate(row["outcomes"]):
            colour = f"C{('backprop', 'exact', 'pnn', 'neuroflux', 'incubate').index(row['method'])}"
            x, y = zip(*curve(outcome), strict=True)
            axes.plot(x, y, color=colour, linewidth=1, label=None if number else row["method"])
            axes.plot(x[-1], y[-1], "o", color=colour, markersize=4)
    axes.set_xlabel("CPU seconds")
    axes.set_ylabel(f"test {study.setting.measure}")
    axes.grid(alpha=0.3)
    axes.legend()
    name = f"ahead_{study.setting.name}.png"
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / name, dpi=120)
    return name


def time_checkpointing(setting: Setting) -> dict[str, Any]:
    """Speed of plain PyTorch with checkpointing beside plain PyTorch, in samples a second, and the peak of the first."""
    options = {name: value for name, value in setting.options if name in ("model_arg",)}
    words = [word for key, value in options.get("model_arg", {}).items() for word in ("--model-arg", f"{key}={value}")]
    command = lowmem_pnn(
        "bench", "--device", "cpu", "--model", setting.model, "--data", setting.data, "--budgets", setting.budget, "--methods", "backprop",
        "--baselines", "plain,checkpointing", "--steps", "20", "--batch-size", str(setting.batch), "--json", "--quiet", *words,
    )  # fmt: skip
    rows = {row["contender"]: row for row in last_json(" ".join(run_process(command).stdout.split("\n")))["rows"]}
    return {
        "plain": rows["plain"]["samples_per_second"],
        "checkpointing": rows["checkpointing"]["samples_per_second"],
        "peak_bytes": rows["checkpointing"]["peak_bytes"],
    }


def main() -> None:
    """Run what is left, then write the page of all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="emnist-few,emnist,cifar10-resnet20,fashion-vgg11,cifar10-resnet32,text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=1e6, help="after which the bench stops; the same command goes on")
    parser.add_argument(
        "--short", "--quick", action="store_true", help="emnist-short, one seed, nothing tuned; a page of its own, ahead_short.md"
    )
    parser.add_argument("--page", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    if arguments.short:
        arguments.settings, arguments.seeds, arguments.trials = "emnist-short", 1, 1
    until = time.monotonic() + (0 if arguments.page else 60 * arguments.minutes)
    known, cache = settings(), Cache("ahead_checkpointing", again=False)
    sections, data, missing = [], {}, []
    for name in arguments.settings.split(","):
        study = Study(known[name], arguments.trials, arguments.seeds)
        has_ended = study.run(until)
        began = any(row["outcomes"] or row["trials"] for row in study.rows())
        if not has_ended:
            missing.append(name if not began else f"{name} (in part)")
        if not began:
            continue
        timed = None
        if study.rows()[0]["outcomes"]:
            timed = cache.get({"setting": name}, lambda setting=known[name]: time_checkpointing(setting))  # type: ignore[misc]
        drawn = picture(study)
        sections.append(page(study, timed) + (f"\n\n![curves]({drawn})" if drawn else ""))
        data[name] = {"rows": study.rows(), "checkpointing": timed}
    head = [emnist_in_words(known["emnist"].data), (__doc__ or "").split("\n\n")[1]]
    if missing:
        head.append(f"**Not run, or not all of it**: {', '.join(missing)}.")
    suffix = "_short" if arguments.short else ""
    write_results(f"ahead{suffix}", "Partition-wise training beside end-to-end training", "\n\n".join([*head, *sections]), data)
    if missing and not arguments.page:
        print(f"stopped; the same command goes on: {' '.join(sys.argv)}", file=sys.stderr)


if __name__ == "__main__":
    main()
