"""The page and the pictures of `pnn_paper.py`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import emnist_in_words, markdown_table
from pnn_study import EPOCHS_LEFT, EPOCHS_RECOVERY, EPOCHS_WHOLE, TUNED_RUNS, best, mean_and_deviation, mean_curve, r_squared
from pnn_weights import BATCH, EPOCHS, LR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pnn_study import Study, Training

YELLOW, BROWN, PINK = "#fff3c4", "#ead7c3", "#f9d5e0"


def pictures(study: Study, histograms: dict[str, Any], folder: Path, suffix: str) -> list[str]:
    """Draw the figures, where there is matplotlib.

    Returns:
        The files' names.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []
    folder.mkdir(exist_ok=True)
    names = []

    def save(figure: Figure, number: int) -> None:
        names.append(f"pnn_paper{suffix}_figure{number}.png")
        figure.savefig(folder / names[-1], dpi=120)

    figure = Figure(figsize=(10, 3), layout="constrained")
    differences = [a - b for a, b in zip(histograms["largest"], histograms["smallest"], strict=True)]
    for axes, values, title in zip(
        figure.subplots(1, 3),
        (histograms["largest"], histograms["smallest"], differences),
        ("largest weight", "smallest weight", "largest - smallest"),
        strict=True,
    ):
        axes.hist(values, bins=30)
        axes.set_title(title)
    save(figure, 1)

    for number, actions in ((6, ("learn",)), (10, ("learn", "sweep"))):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        _curves(axes, study, actions)
        save(figure, number)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    points = study.left_epochs()
    for kappa in sorted({kappa for kappa, _ in points}):
        mine = {left: mean_and_deviation(runs) for (own, left), runs in points.items() if own == kappa}
        axes.errorbar(
            list(mine),
            [mean for mean, _ in mine.values()],
            [off for _, off in mine.values()],
            fmt="o-",
            capsize=3,
            label=f"kappa {kappa:g}",
        )
    axes.set_xlabel("epochs of the left partition")
    axes.set_ylabel("test accuracy, %")
    axes.legend()
    save(figure, 7)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    by_kappa = {kappa: mean_and_deviation(runs) for kappa, runs in study.kappas().items()}
    axes.errorbar(
        list(by_kappa), [mean for mean, _ in by_kappa.values()], [off for _, off in by_kappa.values()], fmt="o-", capsize=3
    )
    axes.set_xscale("log")
    axes.set_xlabel("kappa")
    axes.set_ylabel("test accuracy, %")
    save(figure, 8)

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for runs, label in zip(study.like_lr(), ("kappa 10, lr 0.01", "kappa 1, lr 0.1"), strict=True):
        macs, means, _ = mean_curve(runs, "learn")
        axes.plot([value / 1e9 for value in macs], means, label=label)
    axes.set_xlabel("forward computation, GMAC")
    axes.set_ylabel("test accuracy, %")
    axes.legend()
    save(figure, 9)
    return names


def _curves(axes: Axes, study: Study, actions: tuple[str, ...]) -> None:
    """Accuracy against computation of the baseline and of PNN, on backgrounds that tell the phases."""
    for runs, label, chosen in ((study.baseline(), "baseline", ("learn",)), (study.recovered(), "PNN", actions)):
        macs, means, offs = mean_curve(runs, *chosen)
        every = max(1, len(macs) // 40)
        giga = [value / 1e9 for value in macs]
        axes.errorbar(giga, means, offs, fmt="o-", markersize=2, capsize=2, errorevery=every, label=label)
    right, _, _ = mean_curve(study.recovered(), "learn")
    begin = 2 * right[0] - right[1]  # the right partition's epochs are all alike
    axes.axvspan(0, begin / 1e9, color=YELLOW, zorder=0, label="left trains")
    axes.axvspan(begin / 1e9, right[-1] / 1e9, color=BROWN, zorder=0, label="right trains")
    if "sweep" in actions:
        axes.axvspan(right[-1] / 1e9, mean_curve(study.recovered(), "sweep")[0][-1] / 1e9, color=PINK, zorder=0, label="recovery")
    axes.set_xlabel("forward computation, GMAC")
    axes.set_ylabel("test accuracy, %")
    axes.legend(loc="lower right")


def text(study: Study, histograms: dict[str, Any], names: list[str], seconds: float) -> str:
    """The tables, the pictures, and what they say."""
    baseline, recovered = study.baseline(), study.recovered()
    before = [_last(training, "learn") for training in recovered]
    after = [training.outcome()["test_accuracy"] for training in recovered]
    pnn_macs = [point[0] for point in recovered[0].outcome()["curve"] if point[2] == "learn"][-1]
    whole = recovered[0].outcome()["partitions"]
    figure_7, figure_8 = study.left_epochs(), {kappa: mean_and_deviation(runs) for kappa, runs in study.kappas().items()}
    peak = max(figure_8, key=lambda kappa: figure_8[kappa][0])
    one, other = (mean_curve(runs, "learn")[1] for runs in study.like_lr())
    rows = [
        _row("6: baseline, test accuracy %", 76.2, *_mean([run.outcome()["test_accuracy"] for run in baseline])),
        _row("6: PNN, test accuracy %", 71.5, *_mean(before)),
        _row("10: before recovery %", 72.0, *_mean(before)),
        _row(f"10: after {EPOCHS_RECOVERY} epochs of recovery %", 77.5, *_mean(after)),
        (
            "6: forward MACs of PNN / baseline",
            _ratio_of_paper(study.right),
            f"{pnn_macs / baseline[0].outcome()['macs']:.2f}",
            "",
            "",
        ),
        ("parameters left, right", "67,660, 10,187", ", ".join(f"{part['params']:,}" for part in whole), "", ""),
        ("9: R^2 of kappa 10, lr 0.01 and kappa 1, lr 0.1", "> 0.99", f"{r_squared(one, other):.3f}", "", ""),
        ("8: best kappa", "an optimum exists", f"{peak:g} ({figure_8[peak][0]:.1f} %)", "", ""),
    ]
    for kappa in sorted({kappa for kappa, _ in figure_7}):
        longest = max(left for own, left in figure_7 if own == kappa)
        gain = mean_and_deviation(figure_7[kappa, longest])[0] - mean_and_deviation(figure_7[kappa, EPOCHS_LEFT])[0]
        rows.append(
            (
                f"7: accuracy gained from {EPOCHS_LEFT} to {longest} epochs left, kappa {kappa:g}",
                "about 0",
                f"{gain:+.1f}",
                "",
                "",
            )
        )
    wholes, pnns = study.candidates()
    tuned, tuned_pnn = study.tuned(best(wholes)), study.tuned(best(pnns), recovery=True)
    honest = [
        _row("paper's baseline", 76.2, *_mean([run.outcome()["test_accuracy"] for run in baseline])),
        _row("paper's PNN", 71.5, *_mean(before)),
        _row("paper's PNN and recovery", 77.5, *_mean(after)),
        _row(f"tuned baseline: {_words(best(wholes))}", None, *_mean([run.outcome()["test_accuracy"] for run in tuned])),
        _row(f"tuned PNN: {_words(best(pnns))}", None, *_mean([_last(run, "learn") for run in tuned_pnn])),
        _row(
            f"tuned PNN and {EPOCHS_RECOVERY} epochs of recovery",
            None,
            *_mean([run.outcome()["test_accuracy"] for run in tuned_pnn]),
        ),
    ]
    whole_mean = _mean([run.outcome()["test_accuracy"] for run in tuned])[0]
    gap = whole_mean - _mean([run.outcome()["test_accuracy"] for run in tuned_pnn])[0]
    heads = ("figure, quantity", "paper", "ours", "deviation", "difference")
    tried = [
        (_words(training), f"{training.outcome()['val_accuracy']:.1f}", f"{training.outcome()['macs'] / 1e12:.2f}")
        for training in (*wholes, *pnns)
    ]
    differences = [a - b for a, b in zip(histograms["largest"], histograms["smallest"], strict=True)]
    spread = ", ".join(
        f"{name} {statistics.mean(values):.2f} ± {statistics.pstdev(values):.2f}"
        for name, values in (
            ("largest", histograms["largest"]),
            ("smallest", histograms["smallest"]),
            ("difference", differences),
        )
    )
    return "\n".join(
        [
            emnist_in_words(study.data),
            f"{study.runs} run(s) of figures 6 and 10, at most {TUNED_RUNS} of the tuned ones, {study.sweep_runs} of each point of figures 7 to "
            f"9 (seeds from 0); N_L {EPOCHS_LEFT}, N_R {study.right}, baseline {EPOCHS_WHOLE} epochs. {seconds / 60:.0f} minutes of training "
            "in all, one thread each. Forward MACs are those of training samples, outputs that are written included.",
            "",
            markdown_table(heads, rows),
            "",
            f"Figure 1: {len(differences)} networks of 100, 50 and 10 neurons, {EPOCHS} epochs, batch {BATCH}, Adam {LR} (the paper does not "
            f"tell), on {histograms['images']:,} digits of the same data instead of MNIST; {histograms['accuracy']:.1f} % right. Weights of the "
            f"middle layer, mean and deviation over networks: {spread}.",
            "",
            "Against a tuned baseline:",
            "",
            markdown_table(("", "paper", "ours", "deviation", "difference"), honest),
            "",
            f"The paper's baseline is under-trained: the same network, tuned, is {whole_mean:.1f} %, {gap:.1f} points above the best PNN "
            "with recovery. On this network PNN costs accuracy; what it buys is one partition on the device at a time.",
            "",
            "Chosen by accuracy on a tenth of the training data, one run each:",
            "",
            markdown_table(("candidate", "validation accuracy %", "forward TMAC"), tried),
            "",
            *(f"![figure]({name})" for name in names),
        ]
    )


def _last(training: Training, action: str) -> float:
    """Accuracy after the last epoch of an action, in percent."""
    return float([point[1] for point in training.outcome()["curve"] if point[2] == action][-1])


def _mean(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.pstdev(values)


def _row(name: str, paper: float | None, mean: float, deviation: float) -> tuple[str, ...]:
    if paper is None:
        return name, "-", f"{mean:.1f}", f"{deviation:.1f}", "-"
    return name, f"{paper:.1f}", f"{mean:.1f}", f"{deviation:.1f}", f"{mean - paper:+.1f}"


def _ratio_of_paper(right: int) -> str:
    """From the MACs that the paper gives (section 3)."""
    return f"{(EPOCHS_LEFT * 67_800 + right * 10_307) / (EPOCHS_WHOLE * (67_800 + 10_307)):.2f}"


def _words(training: Training) -> str:
    """A candidate's own settings."""
    options = dict(training.options)
    shown = ["epochs", "lr", "batch_size", "optimizer", "lr_schedule", "sil", "kappa"]

    def word(value: Any) -> str:
        return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)

    return options["method"] + " " + " ".join(f"{name} {word(options[name])}" for name in shown if name in options)
