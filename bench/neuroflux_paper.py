"""NeuroFlux's claims (arXiv 2402.14139): adaptive local learning beside its rivals, at equal memory.

VGG-11, VGG-16, ResNet-18 and MobileNetV2 for CIFAR-10, three budgets each; at the tightest one backprop fits 2 to 8 images at a time.
Each contender is a process of its own; they take turns, round after round. The paper's rivals are backprop with the batch that fits,
and classic local learning (256 filters in every head, one batch size). The harder ones are backprop with accumulation, and with
checkpointing too, in plain PyTorch; and `exact`.

    python bench/neuroflux_paper.py [--quick] [--data cifar10 | npz:cifar10.npz] [--rounds 1] [--again]

The plain form is for one CPU core: networks of a quarter of the width and a part of the images; about an hour and a half. Speed is
measured on few images, accuracy on more of them: `--only speed` or `--only accuracy` runs the one of them that a busy machine would
disturb, or the other; the page is written when both are there. Finished runs are kept in bench/.cache/.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common import RESULTS, Cache, default_cifar10, markdown_table, write_results
from neuroflux_runs import (
    ACCUMULATION,
    BATCH,
    CHECKPOINTING,
    CLASSIC,
    CONTENDERS,
    EXACT,
    LR,
    MB,
    NEUROFLUX,
    PLAIN,
    SMALL_BATCH,
    Runs,
    Setting,
)

from lowmem_pnn.evaluation.exits import choose_exit

# Whose accuracy is measured: accumulation learns the same with checkpoints and without, from the micro-batch that fits.
LEARNERS = (NEUROFLUX, SMALL_BATCH, ACCUMULATION, CLASSIC, EXACT)
# Of the best validation accuracy that backprop with the batch that fits comes to: what the seconds are counted to.
TARGET = 0.9
TOLERANCE = 1.0


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Args:
        networks: by name: factor of the width; budgets in megabytes, the tightest first; images for accuracy, a fifth of them to
            validate on.
        images: to measure speed with.
        speed_epochs: of which the last is measured.
        tests: test images.
        epochs: for accuracy.
    """

    networks: Mapping[str, tuple[float, tuple[int, ...], int]]
    images: int
    speed_epochs: int
    tests: int
    epochs: int


PLAIN_SIZE = Size(
    networks={
        "cifar-vgg11": (0.25, (33, 50, 85), 4000),
        "cifar-vgg16": (0.25, (48, 72, 120), 4000),
        "cifar-resnet18": (0.25, (48, 72, 120), 4000),
        "cifar-mobilenetv2": (0.25, (64, 96, 160), 2000),
    },
    images=512,
    speed_epochs=2,
    tests=2000,
    epochs=6,
)
QUICK_SIZE = Size(networks={"cifar-vgg11": (0.25, (33, 85), 1000)}, images=256, speed_epochs=2, tests=500, epochs=2)


class Page:
    """What the runs of a network came to.

    Args:
        runs: cached.
        size: how much of everything.
        network: its name.
        data: to train on.
        rounds: of the speed runs.
    """

    def __init__(self, runs: Runs, size: Size, network: str, data: str, rounds: int) -> None:
        self.network, self._runs, self._size, self._data, self._rounds = network, runs, size, data, rounds
        self.width, self.budgets, self.learnt = size.networks[network]

    def _setting(self, budget: int, *, accuracy: bool) -> Setting:
        size = self._size
        images, tests, epochs, share = (
            (self.learnt, size.tests, size.epochs, 0.2) if accuracy else (size.images, 64, size.speed_epochs, 0.0)
        )
        return Setting(self.network, self.width, self._data, int(budget * MB), images, tests, epochs, share)

    def speeds(self) -> dict[int, dict[str, dict[str, Any]]]:
        """Figures of every contender, by budget: medians over rounds."""
        found: dict[int, dict[str, list[dict[str, Any]]]] = {}
        for round_ in range(self._rounds):
            for budget in self.budgets:
                for name in CONTENDERS:
                    figures = self._runs.contender(name, self._setting(budget, accuracy=False), round_)
                    found.setdefault(budget, {}).setdefault(name, []).append(figures)
        return {
            budget: {name: {**own[0], "epoch": self._epoch_seconds(own)} for name, own in contenders.items()}
            for budget, contenders in found.items()
        }

    def _epoch_seconds(self, figures: Sequence[Mapping[str, Any]]) -> float | None:
        """Seconds of an epoch, with its share of the caching; None for what does not fit."""
        if "reason" in figures[0]:
            return None
        return statistics.median(own["learning"] + own["caching"] / self._size.epochs for own in figures)

    def accuracies(self) -> dict[str, dict[str, Any]]:
        """Figures of those whose accuracy is measured, at the tightest budget."""
        return {name: self._runs.contender(name, self._setting(self.budgets[0], accuracy=True)) for name in LEARNERS}

    def training_state(self) -> int:
        """Bytes of weights, gradients and optimizer state."""
        setting = self._setting(self.budgets[-1], accuracy=False)
        state: int = self._runs.plan(setting, {"method": "backprop", "batch_size": BATCH})["training_state_bytes"]
        return state


def speed_table(speeds: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> str:
    """A row per budget and contender."""
    heads = (
        "budget MB", "contender", "partitions", "batch", "micro-batch", "s an epoch", "neuroflux is faster by", "peak MB",
        "of the budget", "cache MB",
    )  # fmt: skip
    rows = []
    for budget, contenders in speeds.items():
        own = contenders[NEUROFLUX]["epoch"]
        for name, found in contenders.items():
            if found["epoch"] is None:
                rows.append((str(budget), name, *("-" for _ in range(7)), "does not fit"))
                continue
            rows.append(
                (
                    str(budget), name, str(len(found["batches"])), in_words(found["batches"]), in_words(found["micro_batches"]),
                    f"{found['epoch']:.2f}", "-" if own is None or name == NEUROFLUX else f"{found['epoch'] / own:.2f}",
                    f"{found['peak'] / MB:.0f}", f"{found['peak'] / (budget * MB):.2f}", f"{found['cache_bytes'] / MB:.0f}",
                )
            )  # fmt: skip
    return markdown_table(heads, rows)


def in_words(numbers: Sequence[int]) -> str:
    """Numbers of partitions, once where they are the same."""
    return ", ".join(map(str, numbers if len({*numbers}) > 1 else numbers[:1]))


def seconds_to(target: float, learnt: Mapping[str, Any], speed: Mapping[str, Any], size: Size, network: str) -> float | None:
    """Seconds until an exit's validation accuracy reaches a target, at the speed that was measured on a quiet machine.

    Args:
        target: from 0 to 1.
        learnt: figures of the run for accuracy.
        speed: figures of the run for speed.
        size: images of both.
        network: its name.

    Returns:
        None where it never does.
    """
    scale = size.networks[network][2] * 0.8 / size.images
    seconds, seen = 0.0, set()
    # A sweep's lines are the last partition's, and its epochs those of all of them.
    numbers = sorted({line.get("partition", 0) for line in learnt["epochs"]})
    parts = dict(zip(numbers, learnt["learning_parts"], strict=True))
    for line in learnt["epochs"]:
        partition = line.get("partition", 0)
        if partition not in seen and seen:
            seconds += scale * speed["caching"] / (len(learnt["learning_parts"]) - 1)
        seen.add(partition)
        # Both are cut a little differently; a block's share is that of the run for accuracy.
        seconds += scale * speed["learning"] * parts[partition] / learnt["learning"]
        if line["val_accuracy"] is not None and line["val_accuracy"] >= target:
            return seconds
    return None


def times_to_target(
    found: Mapping[str, Mapping[str, Any]], speeds: Mapping[str, Mapping[str, Any]], size: Size, network: str
) -> tuple[float, dict[str, float | None]]:
    """A validation accuracy that backprop comes to, and every learner's seconds to it; None for who never does."""
    target = TARGET * max(line["val_accuracy"] for line in found[SMALL_BATCH]["epochs"])
    return target, {
        name: seconds_to(target, own, speeds[name], size, network) for name, own in found.items() if "reason" not in own
    }


def accuracy_table(
    found: Mapping[str, Mapping[str, Any]], speeds: Mapping[str, Mapping[str, Any]], size: Size, network: str
) -> str:
    """A row per learner."""
    base = found[SMALL_BATCH]
    target, times = times_to_target(found, speeds, size, network)
    heads = ("contender", "val %", "test %", "points from backprop", f"s to {100 * target:.1f} % val", "ratio to neuroflux")
    rows = []
    for name, own in found.items():
        if "reason" in own:
            rows.append((name, *("-" for _ in range(4)), "does not fit"))
            continue
        time, ours = times[name], times.get(NEUROFLUX)
        rows.append(
            (
                name, f"{100 * own['val_accuracy']:.1f}", f"{100 * own['test_accuracy']:.1f}",
                f"{100 * (own['test_accuracy'] - base['test_accuracy']):+.1f}",
                "never" if time is None else f"{time:.0f}", "-" if time is None or ours is None else f"{time / ours:.2f}",
            )
        )  # fmt: skip
    return markdown_table(heads, rows)


def exits_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """The chosen exit of a run of neuroflux, against the whole model."""
    exits = found["exits"]
    accuracies = [exit["val_accuracy"] for exit in exits]
    chosen, best = choose_exit(accuracies, TOLERANCE / 100), max(accuracies)
    whole, taken = exits[-1], exits[chosen]
    return {
        "number": chosen + 1,
        "of": len(exits),
        "layer": taken["layer"],
        "params": taken["params"],
        "smaller": whole["params"] / taken["params"],
        "faster": taken["samples_per_second"] / whole["samples_per_second"],
        "val_points": 100 * (taken["val_accuracy"] - best),
        "test": 100 * taken["test_accuracy"],
        "test_points": 100 * (taken["test_accuracy"] - whole["test_accuracy"]),
    }


def exits_table(exits: Mapping[str, Mapping[str, Any]]) -> str:
    """A row per network."""
    heads = (
        "network", "exit", "parameters", "smaller (paper: 10.9 to 29.4)", "faster (paper: 1.61 to 3.95)", "val points from the best exit",
        "test %", "test points from the whole",
    )  # fmt: skip
    return markdown_table(
        heads,
        [
            (
                network, f"{own['number']} of {own['of']}", f"{own['params']:,}", f"{own['smaller']:.1f}", f"{own['faster']:.2f}",
                f"{own['val_points']:+.1f}", f"{own['test']:.1f}", f"{own['test_points']:+.1f}",
            )
            for network, own in exits.items()
        ],
    )  # fmt: skip


def overheads_table(found: Mapping[str, Mapping[str, Any]], epochs: int) -> str:
    """A row per network: shares of the run at the tightest budget."""
    heads = (
        "network", "seconds", "start", "learning", "caching", "rest", f"start and caching over {epochs} epochs, s an epoch",
        "written MB", "read MB",
    )  # fmt: skip
    rows = []
    for network, own in found.items():
        whole = own["seconds"]
        learning = whole - own["start"] - own["caching"] - own["rest"]
        shares = (f"{100 * part / whole:.1f} %" for part in (own["start"], learning, own["caching"], own["rest"]))
        rows.append(
            (
                network, f"{whole:.0f}", *shares, f"{(own['start'] + own['caching']) / epochs:.2f}",
                f"{own['bytes_written'] / MB:.0f}", f"{own['bytes_read'] / MB:.0f}",
            )
        )  # fmt: skip
    return markdown_table(heads, rows)


def goals(
    speeds: Mapping[str, Mapping[int, Mapping[str, Mapping[str, Any]]]],
    learnt: Mapping[str, Mapping[str, Mapping[str, Any]]],
    exits: Mapping[str, Mapping[str, Any]],
    size: Size,
) -> list[str]:
    """What the paper claims, and what nobody has shown, against what was measured: a line each."""

    def faster(rival: str, tightest: bool) -> list[float]:
        ratios = []
        for found in speeds.values():
            for budget in list(found)[: 1 if tightest else None]:
                own, other = found[budget][NEUROFLUX]["epoch"], found[budget][rival]["epoch"]
                if own is not None and other is not None:
                    ratios.append(other / own)
        return ratios

    lines = []
    for rival, tightest, goal in (
        (SMALL_BATCH, False, 2.3),
        (SMALL_BATCH, True, 6.1),
        (CLASSIC, False, 3.3),
        (CLASSIC, True, 10.3),
        (CHECKPOINTING, False, 1.0),
        (ACCUMULATION, False, 1.0),
        (PLAIN, False, 1.0),
        (EXACT, False, 1.0),
    ):
        ratios = faster(rival, tightest)
        where = "at the tightest budgets" if tightest else "at all budgets"
        met = bool(ratios) and min(ratios) >= goal
        shown = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "nothing to compare"
        lines.append(f"- at least {goal:g} times as fast as {rival}, {where}: {shown}, {verdict(met)}")
    sooner = []
    for network, own in learnt.items():
        _, times = times_to_target(own, speeds[network][next(iter(speeds[network]))], size, network)
        ours, theirs = times.get(NEUROFLUX), times.get(SMALL_BATCH)
        if ours is not None and theirs is not None:
            sooner.append(theirs / ours)
    if sooner:
        shown = f"{min(sooner):.2f} to {max(sooner):.2f}"
        words = f"to {100 * TARGET:.0f} % of backprop's best validation accuracy, at the tightest budgets, sooner than backprop"
        lines.append(f"- {words}: {shown} times, {verdict(min(sooner) >= 1)}")
    points = [
        100 * (own[NEUROFLUX]["test_accuracy"] - own[SMALL_BATCH]["test_accuracy"])
        for own in learnt.values()
        if not any("reason" in own[name] for name in (NEUROFLUX, SMALL_BATCH))
    ]
    if points:
        shown = f"{min(points):+.1f} to {max(points):+.1f} points"
        met = min(points) >= -TOLERANCE
        lines.append(f"- test accuracy within {TOLERANCE:g} point of backprop at equal epochs: {shown}, {verdict(met)}")
    for key, low, high, words in (("smaller", 10.9, 29.4, "smaller"), ("faster", 1.61, 3.95, "faster")):
        values = [own[key] for own in exits.values()]
        if values:
            shown = f"{min(values):.2f} to {max(values):.2f}"
            lines.append(f"- exits {low} to {high} times {words}: {shown}, {verdict(min(values) >= low)}")
    return lines


def reasons(speeds: Mapping[str, Mapping[int, Mapping[str, Mapping[str, Any]]]]) -> list[str]:
    """Why speed is not the paper's, with what was measured: a line each."""
    small, heads, planned = [], [], []
    for network, found in speeds.items():
        tightest, widest = found[next(iter(found))], found[list(found)[-1]]
        name = network.removeprefix("cifar-")
        if tightest[PLAIN]["epoch"] and widest[PLAIN]["epoch"]:
            sizes = f"{tightest[PLAIN]['micro_batches'][0]} images take {tightest[PLAIN]['epoch'] / widest[PLAIN]['epoch']:.2f}"
            small.append(f"{name} {sizes} of the time of {widest[PLAIN]['micro_batches'][0]}")
        if tightest[PLAIN]["epoch"] and tightest[ACCUMULATION]["epoch"]:
            sizes = f"{tightest[ACCUMULATION]['micro_batches'][0]} against {tightest[PLAIN]['micro_batches'][0]}"
            planned.append(f"{name} {sizes}")
        # Where everything is one block nothing is run a second time, so that heads are all that differs.
        if widest[NEUROFLUX]["epoch"] and widest[ACCUMULATION]["epoch"] and len(widest[NEUROFLUX]["batches"]) == 1:
            heads.append(f"{name} {100 * (widest[NEUROFLUX]['macs'] / widest[ACCUMULATION]['macs'] - 1):.0f} %")
    return [
        "The paper's speed-up comes from GPUs, which small batches leave idle. One CPU core is busy with few images: in plain PyTorch "
        f"{'; '.join(small)}. So there is next to no time in larger batches that a local method could win.",
        f"Heads are work of their own, in forward MACs: {', '.join(heads)}.",
        f"Our plan for backprop holds for what it cannot measure beforehand, and takes fewer images at once than plain PyTorch, which "
        f"was given the largest micro-batch whose measured peak stays in the budget: {', '.join(planned)}. Hence rows for both.",
        "What local learning wins here is accuracy after the same epochs, and with it the time to reach one: its steps are of the batch "
        "that fits a block, each layer has a loss next to it, and these short trainings are far from converged. For the same reason the "
        "best exit is often among the last, so that exits are hardly smaller: the paper's networks were trained to their end.",
        "Tried against it, in `neuroflux_ablation.md`: other heads, laps, interleaved blocks, blocks of layers with like batches.",
    ]


def verdict(met: bool) -> str:
    """In words."""
    return "met" if met else "NOT MET"


def draw(
    speeds: Mapping[str, Mapping[int, Mapping[str, Mapping[str, Any]]]],
    learnt: Mapping[str, Mapping[str, Mapping[str, Any]]],
    size: Size,
    name: str,
) -> bool:
    """Seconds an epoch against the budget, and accuracy against time, a column per network; False where there is no matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(speeds), figsize=(4.5 * len(speeds), 8), constrained_layout=True, squeeze=False)
    for column, network in enumerate(speeds):
        upper, lower = axes[0][column], axes[1][column]
        for number, contender in enumerate(CONTENDERS):
            points = [(budget, own[contender]["epoch"]) for budget, own in speeds[network].items()]
            points = [(budget, seconds) for budget, seconds in points if seconds is not None]
            upper.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=contender) if points else None
            own = learnt[network].get(contender)
            if own is None or "reason" in own:
                continue
            tightest = speeds[network][next(iter(speeds[network]))][contender]
            # A later epoch may be worse, and so may be the first of a later block: the best so far is what one has.
            levels = sorted({line["val_accuracy"] for line in own["epochs"]})
            times = [seconds_to(level, own, tightest, size, network) for level in levels]
            lower.step(times, [100 * level for level in levels], where="post", color=f"C{number}")
        upper.set(title=network, xlabel="budget, MB", ylabel="seconds an epoch", yscale="log")
        lower.set(xlabel="seconds of training, tightest budget", ylabel="best validation accuracy of an exit, %")
    axes[0][0].legend(fontsize="small")
    figure.savefig(RESULTS / f"{name}.png", dpi=90)
    return True


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=default_cifar10(), help="32x32 images in colour")
    parser.add_argument("--quick", action="store_true", help="one network, two budgets, two epochs: some minutes")
    parser.add_argument("--rounds", type=int, default=1, help="repetitions of the speed runs")
    parser.add_argument("--only", choices=("speed", "accuracy"), help="run these, write no page")
    parser.add_argument("--again", action="store_true", help="forget the runs that are finished")
    arguments = parser.parse_args()
    name = "neuroflux_paper_quick" if arguments.quick else "neuroflux_paper"
    size = QUICK_SIZE if arguments.quick else PLAIN_SIZE
    runs = Runs(Cache(name, arguments.again))
    pages = [Page(runs, size, network, arguments.data, arguments.rounds) for network in size.networks]
    if arguments.only == "accuracy":
        for page in pages:
            page.accuracies()
        return
    speeds = {page.network: page.speeds() for page in pages}
    if arguments.only == "speed":
        return
    learnt = {page.network: page.accuracies() for page in pages}
    exits = {network: exits_of(own[NEUROFLUX]) for network, own in learnt.items() if "reason" not in own[NEUROFLUX]}
    drawn = draw(speeds, learnt, size, name)
    lines = [
        f"CIFAR-10, SGD with momentum 0.9, learning rate {LR:g} x (samples a step / {BATCH}); one run of each, on the CPU.",
        f"Speed: {size.images} images, the last of {size.speed_epochs} epochs, and the caching's share in {size.epochs} epochs.",
        f"Accuracy: 2,000 to 4,000 images, a fifth of which validates, {size.epochs} epochs for every layer, tested on {size.tests}.",
        f"Micro-batches of accumulation add up to {BATCH}. Peaks are private memory above what the process held before.",
        "",
        *goals(speeds, learnt, exits, size),
        "",
        *(f"- {reason}" for reason in reasons(speeds)),
        "",
        *([f"![Seconds an epoch against the budget, and accuracy against time]({name}.png)", ""] if drawn else []),
    ]
    for page in pages:
        state = page.training_state() / MB
        lines += [
            f"## {page.network}, width {page.width:g}, training state {state:.1f} MB",
            "",
            speed_table(speeds[page.network]),
            "",
            f"Accuracy at {page.budgets[0]} MB, of {page.learnt} images:",
            "",
            accuracy_table(learnt[page.network], speeds[page.network][page.budgets[0]], size, page.network),
            "",
        ]
    overheads = {network: own[NEUROFLUX] for network, own in learnt.items() if "reason" not in own[NEUROFLUX]}
    lines += [
        "## Exits",
        "",
        "The smallest prefix whose validation accuracy is within one point of the best exit's.",
        "",
        exits_table(exits),
        "",
        "## Overheads",
        "",
        "Of the runs for accuracy: `start` is profiling, planning and the check before training; `rest` is validating and testing.",
        "",
        overheads_table(overheads, size.epochs),
    ]
    data = {
        network: {"speed": speeds[network], "accuracy": learnt[network], "exit": exits.get(network)} for network in size.networks
    }
    write_results(name, "Adaptive local learning: NeuroFlux's claims", "\n".join(lines), data)


if __name__ == "__main__":
    main()
