"""Do synthetic intermediate labels train convolutional and attention networks?

The future work of PNN's paper (arXiv 2403.11204, section 6): a ResNet-18 for small images and a vision transformer on CIFAR-10, cut
into 2 and 4 partitions, beside `backprop` with the same epochs for every layer, the same optimizer and data. What is tried: codes of
the boundary's own shape (`full`) and of its means over positions (`pooled`); `uniform` codes, as in the paper, and `sparse` ones;
kappa 1 and 10; two learning rates. The validation images choose. And a control: the partitions before the last left as they were
initialised, so that what the last one learns from are random features.

    python bench/pnn_vision.py [--quick | --full] [--data cifar10 | npz:cifar10.npz] [--again]

The plain form is for one CPU core: 4,000 images, 4 epochs. `--full` is for a GPU: all images, 30 epochs, larger networks.
Finished runs are kept in bench/.cache/, so that an interrupted bench goes on; `--again` forgets them.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import RESULTS, Cache, default_cifar10, lowmem_pnn, markdown_table, run_process, write_results

HERE = Path(__file__).parent
MB, GIGA = 1e6, 1e9

# Cuts at equal depth.
Labels = tuple[str, str, int]
FACTORIES = {"ResNet-18": "resnet18", "ViT": "vit"}
CUTS: dict[str, dict[int, tuple[str, ...]]] = {
    "ResNet-18": {2: ("block5",), 4: ("block3", "block5", "block7")},
    "ViT": {2: ("block3",), 4: ("block2", "block3", "block4")},
}
LABELS: list[Labels] = [
    (target, sil, kappa) for target in ("full", "pooled") for sil in ("uniform", "sparse") for kappa in (1, 10)
]
KINDS = ("pnn", "untrained", "recovery")
# A rate at which nothing moves.
STILL = 1e-12
# Points of accuracy on 2,000 test images that two runs may differ by for no reason: two deviations of a difference.
NOISE = 3.0


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Args:
        arguments: of the factories, by network.
        images: to train on, a fifth of them to validate; None for all.
        tests: test images; None for all.
        epochs: of every partition, and of backprop.
        recovery: epochs of all partitions together, after.
        batch: samples a step.
        rates: learning rates, by network; the first is used where none is chosen.
        labels: kinds of synthetic labels that are tried with 2 partitions.
        partitions: counts of them.
        device: where it runs.
        budget: enough for whole batches; buffers between disk and device are a share of it.
    """

    arguments: Mapping[str, Mapping[str, Any]]
    images: int | None
    tests: int | None
    epochs: int
    recovery: int
    batch: int
    rates: Mapping[str, tuple[float, ...]]
    labels: list[Labels]
    partitions: tuple[int, ...]
    device: str
    budget: str


PLAIN = Size(
    arguments={"ResNet-18": {"width": 0.25}, "ViT": {"depth": 4}},
    images=4000,
    tests=2000,
    epochs=4,
    recovery=2,
    batch=32,
    rates={"ResNet-18": (1e-3, 3e-3), "ViT": (1e-3, 3e-4)},
    labels=LABELS,
    partitions=(2, 4),
    device="cpu",
    budget="256MB",
)
QUICK = Size(
    arguments={"ResNet-18": {"width": 0.125}, "ViT": {"depth": 4, "width": 32}},
    images=1000,
    tests=500,
    epochs=2,
    recovery=1,
    batch=32,
    rates={"ResNet-18": (1e-3,), "ViT": (1e-3,)},
    labels=[("pooled", "uniform", 1), ("pooled", "sparse", 1)],
    partitions=(2,),
    device="cpu",
    budget="256MB",
)
FULL = Size(
    arguments={"ResNet-18": {"width": 1.0}, "ViT": {"depth": 4, "width": 256}},
    images=None,
    tests=None,
    epochs=30,
    recovery=5,
    batch=128,
    rates={"ResNet-18": (1e-3, 3e-3), "ViT": (1e-3, 3e-4)},
    labels=LABELS,
    partitions=(2, 4),
    device="auto",
    budget="16GB",
)


@dataclass(frozen=True)
class Run:
    """What was run, and its figures.

    Args:
        kind: `backprop`, `longer` (backprop, with as many epochs as recovery has), `pnn`, `untrained` (pnn, but for the partitions
            before the last), or `recovery` (epochs after pnn).
        partitions: 1 for backprop.
        labels: target, distribution and kappa; None for backprop.
        rate: the learning rate.
        figures: from its result.
    """

    kind: str
    partitions: int
    labels: Labels | None
    rate: float
    figures: dict[str, Any]

    @property
    def test(self) -> float:
        """Test accuracy in percent."""
        return 100 * float(self.figures["test_accuracy"])

    @property
    def what(self) -> str:
        """In words."""
        if self.labels is None:
            return "backprop"
        after = {"pnn": "", "untrained": ", only the last trained", "recovery": ", then recovery"}[self.kind]
        return f"{self.partitions} partitions{after}"


class Trials:
    """Runs of one network, each of them once.

    Args:
        cache: of figures.
        size: how much of everything.
        data: to train on.
        network: its name.
    """

    def __init__(self, cache: Cache, size: Size, data: str, network: str) -> None:
        self._cache, self._size, self._data, self._network = cache, size, data, network
        self.runs: list[Run] = []

    def backprop(self, rate: float, longer: bool = False) -> Run:
        """The whole network."""
        more = {"epochs": self._size.epochs + self._size.recovery} if longer else {}
        return self._run("longer" if longer else "backprop", 1, None, rate, {"method": "backprop", "lr": rate, **more})

    def pnn(self, kind: str, partitions: int, labels: Labels, rate: float) -> Run:
        """Partitions, in one of the ways that `Run` names."""
        target, sil, kappa = labels
        options: dict[str, Any] = {"method": "pnn", "cuts": ",".join(CUTS[self._network][partitions]), "lr": rate}
        options |= {"sil_target": target, "sil": sil, "kappa": kappa}
        if kind == "untrained":
            options["lr"] = ",".join([*[str(STILL)] * (partitions - 1), str(rate)])
        if kind == "recovery":
            options |= {"recovery_epochs": self._size.recovery, "recover": "all"}
        return self._run(kind, partitions, labels, rate, options)

    def _run(self, kind: str, partitions: int, labels: Labels | None, rate: float, options: dict[str, Any]) -> Run:
        size = self._size
        fixed = {
            "epochs": size.epochs,
            "batch_size": size.batch,
            "optimizer": "adamw",
            "lr_schedule": "cosine",
            "val_fraction": 0.2,
        }
        limits = {"train_limit": size.images, "test_limit": size.tests}
        options = {**fixed, **{name: limit for name, limit in limits.items() if limit is not None}, **options}
        data = {"data": Path(self._data).name, "device": size.device}
        key = {"network": self._network, "arguments": dict(size.arguments[self._network]), **data, **options}
        run = Run(kind, partitions, labels, rate, self._cache.get(key, partial(self._train, options)))
        if run not in self.runs:
            self.runs.append(run)
        return run

    def _train(self, options: Mapping[str, Any]) -> dict[str, Any]:
        size = self._size
        model = f"{HERE / 'networks.py'}:{FACTORIES[self._network]}"
        command = ["fit", "--model", model, "--data", self._data, "--device", size.device, "--max-gpu-mem", size.budget]
        for name, value in size.arguments[self._network].items():
            command += ["--model-arg", f"{name}={value}"]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        with tempfile.TemporaryDirectory() as folder:
            done = run_process(
                lowmem_pnn(*command, "--workdir", f"{folder}/run", "--commit-every", "1000000", "--json", "--quiet")
            )
        result = json.loads(done.stdout)
        kept = ("val_accuracy", "test_accuracy", "seconds", "macs", "peak_bytes", "bytes_written", "oom_retries")
        partitions = [{name: part[name] for name in ("peak_bytes", "params", "micro_batch")} for part in result["partitions"]]
        return {name: result[name] for name in kept} | {"partitions": partitions, "cpu_seconds": done.cpu_seconds}


def best(runs: Sequence[Run]) -> Run:
    """The run with the highest validation accuracy."""
    return max(runs, key=lambda run: run.figures["val_accuracy"])


def try_network(cache: Cache, size: Size, data: str, network: str) -> list[Run]:
    """All runs of a network; the kind of labels, then the learning rate are chosen with 2 partitions."""
    trials = Trials(cache, size, data, network)
    rates = size.rates[network]
    trials.backprop(best([trials.backprop(rate) for rate in rates]).rate, longer=True)
    chosen = best([trials.pnn("pnn", 2, labels, rates[0]) for labels in size.labels]).labels
    assert chosen is not None
    rate = best([trials.pnn("pnn", 2, chosen, rate) for rate in rates]).rate
    for partitions in size.partitions:
        for kind in KINDS:
            trials.pnn(kind, partitions, chosen, rate)
    return trials.runs


def table_of(runs: Sequence[Run], size: Size) -> str:
    """A row per run: accuracy beside the best backprop's, and what it cost."""
    base = best([run for run in runs if run.kind == "backprop"])
    heads = (
        "method", "labels", "kappa", "lr", "epochs a layer", "test %", "points from backprop", "forward GMACs", "ratio", "CPU seconds",
        "ratio", "peak MB", "ratio",
    )  # fmt: skip
    rows = []
    for run in runs:
        target, sil, kappa = run.labels or ("-", "", "-")
        own, other = run.figures, base.figures
        costs = (("macs", GIGA), ("cpu_seconds", 1), ("peak_bytes", MB))
        rows.append(
            (
                run.what, f"{target} {sil}".strip(), str(kappa), f"{run.rate:g}",
                {"recovery": f"{size.epochs} + {size.recovery}", "longer": str(size.epochs + size.recovery)}.get(run.kind, str(size.epochs)),
                f"{run.test:.1f}", f"{run.test - base.test:+.1f}",
                *(text for name, unit in costs for text in (f"{own[name] / unit:.0f}", f"{own[name] / other[name]:.2f}")),
            )
        )  # fmt: skip
    return markdown_table(heads, rows)


def findings(runs: Sequence[Run], size: Size, rate: float) -> list[str]:
    """What the runs of a network say; `rate` is the learning rate of the grid of labels."""
    base = best([run for run in runs if run.kind == "backprop"])
    longer = next(run for run in runs if run.kind == "longer")
    lines = []
    for partitions in size.partitions:
        own = {kind: best([run for run in runs if (run.kind, run.partitions) == (kind, partitions)]) for kind in KINDS}
        pnn, gain = own["pnn"], own["pnn"].test - own["untrained"].test
        after = own["recovery"].test - longer.test
        worth = f"is worth {gain:.1f} points" if gain > NOISE else f"is worth NOTHING ({gain:+.1f} points)"
        lines += [
            f"- {partitions} partitions: {pnn.test:.1f} %, backprop {base.test:.1f} % ({pnn.test - base.test:+.1f} points). With only the",
            f"  last partition trained it is {own['untrained'].test:.1f} %: training those before it {worth}.",
            f"  {size.recovery} recovery epochs bring it to {own['recovery'].test:.1f} %; backprop of {size.epochs + size.recovery} epochs "
            f"is at {longer.test:.1f} % ({after:+.1f} points).",
            f"  The largest peak is {pnn.figures['peak_bytes'] / base.figures['peak_bytes']:.2f} of backprop's.",
        ]
    grid = {
        run.labels: run.test
        for run in runs
        if run.kind == "pnn" and run.partitions == 2 and run.labels is not None and run.rate == rate
    }
    for at, name in enumerate(("target", "distribution", "kappa")):
        values = dict.fromkeys(labels[at] for labels in grid)
        if len(values) > 1:
            means = {value: statistics.mean(test for labels, test in grid.items() if labels[at] == value) for value in values}
            shown = ", ".join(f"{value} {mean:.1f} %" for value, mean in means.items())
            lines.append(f"- {name}, 2 partitions, mean over the rest of the grid: {shown}.")
    return lines


def draw(found: Mapping[str, Sequence[Run]], size: Size, name: str) -> bool:
    """Accuracy against memory, a picture per network; False where there is no matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(12, 5), constrained_layout=True, squeeze=False)
    looks = {
        "backprop": ("backprop", "s", "k"),
        "longer": ("backprop, as many epochs as recovery", "D", "0.6"),
        "pnn": ("synthetic labels", "o", "C0"),
        "recovery": ("then recovery", "^", "C2"),
        "untrained": ("only the last trained", "x", "C3"),
    }
    for place, (network, runs) in zip(axes.flat, found.items(), strict=True):
        base = best([run for run in runs if run.kind == "backprop"]).figures["peak_bytes"]
        for kind, (label, marker, colour) in looks.items():
            chosen = [run for run in runs if run.kind == kind]
            x = [run.figures["peak_bytes"] / base for run in chosen]
            place.scatter(x, [run.test for run in chosen], marker=marker, color=colour, label=label)
        place.axhline(10, color="k", linewidth=0.5)
        place.set(xlabel="largest peak / backprop's", ylabel="test accuracy, % (line: chance)", title=title_of(network, size))
        place.set(xlim=(0, 1.1), ylim=(0, None))
        place.legend(fontsize="small", loc="lower right")
    figure.savefig(RESULTS / f"{name}.png", dpi=90)
    return True


def title_of(network: str, size: Size) -> str:
    """A network with its size, in words."""
    return f"{network}, {', '.join(f'{name} {value:g}' for name, value in size.arguments[network].items())}"


def main() -> None:
    """Run both networks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=default_cifar10(), help="32x32 images in colour")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="small networks, few runs: about four minutes")
    sizes.add_argument("--full", action="store_true", help="for a GPU: all images, 30 epochs; writes pages of its own")
    parser.add_argument("--again", action="store_true", help="forget the runs that are finished")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL if arguments.full else PLAIN
    name = "pnn_vision" + ("_quick" if arguments.quick else "_full" if arguments.full else "")
    cache = Cache(name, arguments.again)
    found = {network: try_network(cache, size, arguments.data, network) for network in FACTORIES}
    images, tests = (f"{count:,}" if count else "all" for count in (size.images, size.tests))
    tried = {network: " or ".join(f"{rate:g}" for rate in rates) for network, rates in size.rates.items()}
    lines = [
        "The paper (arXiv 2403.11204) tries fully connected networks alone, and leaves these to future work.",
        f"CIFAR-10: {images} images to train on, a fifth of which validates; tested on {tests}. AdamW, cosine, batch {size.batch},",
        f"{size.epochs} epochs for every layer, one seed. The validation images choose the labels, then the learning rate, with 2 partitions.",
        f"Rates: {', '.join(f'{network} {rates}' for network, rates in tried.items())}.",
        f"So pnn is the best of {len(size.labels)} kinds of labels and then of those rates, and backprop the best of those rates alone: some of",
        "what pnn is ahead by, or not behind by, is choice.",
        f"{size.epochs} epochs leave every network far from its best: a higher figure here is faster learning, not a better end.",
        f"On so few test images differences below {NOISE:.0f} points say nothing.",
        "Ratios are to the best backprop. Only the last trained: the partitions before it stay as they were initialised.",
    ]
    if draw(found, size, name):
        lines += ["", f"![Test accuracy against peak memory]({name}.png)"]
    for network, runs in found.items():
        lines += [
            "",
            f"## {title_of(network, size)}",
            "",
            *findings(runs, size, size.rates[network][0]),
            "",
            table_of(runs, size),
        ]
    text = "\n".join(lines)
    data = {network: [asdict(run) for run in runs] for network, runs in found.items()}
    write_results(name, "Synthetic labels on convolution and attention", text, data, machines=cache.machines)


if __name__ == "__main__":
    main()
