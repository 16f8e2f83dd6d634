"""Do the claims hold that PNN's paper makes without figures?

Partitioned Neural Network training (arXiv 2403.11204), sections 1 and 2.1, against ordinary training of the same network:

1. Communication: what crosses a cut crosses it once and one way, instead of in every step and both ways. The paper's network on
   EMNIST; computed from the shapes, and counted in runs.
2. Device memory: a partition needs its share of the whole. Layers of 2048, every count of partitions in a process of its own.
3. Vanishing gradients: partitions train where the whole does not. 12 sigmoid and 20 ReLU layers of 100, PyTorch's own
   initialisation, SGD and Adam; gradient norms, and accuracy after the same epochs a layer.

    python bench/pnn_claims.py [--quick] [--data npz:emnist47.npz | emnist-balanced] [--again]

Finished runs are kept in bench/.cache/, so that an interrupted bench goes on; `--again` forgets them.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Cache, default_emnist, emnist_in_words, markdown_table, run_process, write_results
from common import lowmem_pnn as command_line
from networks import deep_mlp
from safetensors.torch import load_file
from torch import Tensor, nn

import lowmem_pnn
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import DivergedError
from lowmem_pnn.methods.sil import draw_class_vectors
from lowmem_pnn.sweep.boundary_buffers import BoundaryBuffers
from lowmem_pnn.workload import open_data

HERE = Path(__file__).parent
MB = 1e6

# 1. The paper's network and recipe, but for the epochs of the runs that are counted: these can be few.
WIDTHS = (784, 80, 60, 60, 60, 47)
CUTS = {2: (2,), 5: (1, 2, 3, 4)}
RECIPE: dict[str, Any] = {"batch_size": 1410, "optimizer": "sgd", "lr": 0.01, "momentum": 0.9, "val_fraction": 0.0}
PAPER_IMAGES, PAPER_EPOCHS = 112_800, 40
COUNTED_EPOCHS = 3
BUDGET, SMALL_BUDGET = "200MB", "45MB"

# 2. Wide enough that layers outweigh everything else.
WIDE = {"width": 2048, "depth": 12, "batch": 256, "budget": "4GB"}
WIDE_PARTITIONS = (2, 3, 4, 6, 12)

# 3. Networks whose gradients vanish, and the learning rates that were tried; of pnn: kappa, the rate of the partitions that learn
# synthetic labels, and that of the last. A sigmoid's outputs are below 1, so kappa is 1 there.
NETWORKS: dict[str, dict[str, Any]] = {
    "12 sigmoid": {"depth": 12, "activation": "sigmoid"},
    "20 ReLU": {"depth": 20, "activation": "relu"},
}
DEEP_PARTITIONS = (2, 4, 6)
DEEP_BATCH, DEEP_EPOCHS, DEEP_IMAGES = 128, 5, 20_000
BACKPROP_RATES = {"sgd": (0.01, 0.1, 1.0), "adam": (3e-4, 1e-3, 3e-3, 1e-2)}
LEARNT = 0.04
SCALED_RATES = {"sgd": (0.01, 0.1, 1.0), "adam": (3e-4, 1e-3, 3e-3)}
PNN_RATES = {
    ("sigmoid", "sgd"): ((1, 50, 0.1), (1, 50, 1.0), (1, 500, 1.0)),
    ("sigmoid", "adam"): ((1, 1e-3, 1e-3), (1, 3e-3, 3e-3), (1, 1e-2, 1e-2)),
    ("relu", "sgd"): ((10, 0.01, 0.01), (1, 1.0, 0.1), (1, 3.0, 0.1), (1, 10.0, 0.1)),
    ("relu", "adam"): ((1, 1e-3, 1e-3), (1, 3e-3, 3e-3), (10, 1e-3, 1e-3)),
}


# 1. Communication: b bytes an image at all cuts together, N images, E epochs: N b with synthetic labels, 2 N b E without.


@contextmanager
def counted_crossings() -> Iterator[dict[str, int]]:
    """Count the bytes of activations and gradients that cross cuts while sweeps run in this process."""
    counts = {"activations": 0, "gradients": 0}
    put_activations, put_gradients = BoundaryBuffers.put_activations, BoundaryBuffers.put_gradients

    def count_activations(self: BoundaryBuffers, boundary: int, number: int, tensors: Sequence[Tensor]) -> None:
        if boundary:  # 0 is where the images come in
            if not counts["activations"]:
                counts["gradients"] = 0  # the check before training goes backward without having gone forward
            counts["activations"] += sum(tensor.nbytes for tensor in tensors)
        put_activations(self, boundary, number, tensors)

    def count_gradients(self: BoundaryBuffers, boundary: int, number: int, gradients: Sequence[Tensor | None]) -> None:
        counts["gradients"] += sum(tensor.nbytes for tensor in gradients if tensor is not None)
        put_gradients(self, boundary, number, gradients)

    BoundaryBuffers.put_activations, BoundaryBuffers.put_gradients = count_activations, count_gradients  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        BoundaryBuffers.put_activations, BoundaryBuffers.put_gradients = put_activations, put_gradients  # type: ignore[method-assign]


def count_crossings(data: str, limit: int | None, method: str, partitions: int, budget: str) -> dict[str, Any]:
    """Train the paper's network, and count.

    Returns:
        For `exact` the bytes that crossed in an epoch, `forward` and `back`, and the bytes of weights and optimizer state that it
        wrote. For `pnn` the bytes that were `stored` at the cuts, and those that the last partition read again in a later epoch.
    """
    options = {**RECIPE, "method": method, "cuts": CUTS[partitions], "epochs": COUNTED_EPOCHS, "train_limit": limit}
    options |= {"kappa": 10} if method == "pnn" else {}
    with tempfile.TemporaryDirectory() as folder, counted_crossings() as counts:
        model = "mlp:" + "-".join(map(str, WIDTHS))
        result = fit(model, data, folder, max_gpu_mem=budget, **options)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    later_epoch = {key: lines[-1][key] - lines[-2][key] for key in ("bytes_read", "bytes_written")}
    if method == "exact":
        crossed = {"forward": counts["activations"] // COUNTED_EPOCHS, "back": counts["gradients"] // COUNTED_EPOCHS}
        return {**crossed, "weights_written": later_epoch["bytes_written"]}
    # Between the first line and the last each partition's weights and momentum are written once, and what it leaves at its cut.
    weights = sum(partition["params"] for partition in result.partitions[:-1])
    stored = lines[-1]["bytes_written"] - lines[0]["bytes_written"] - 2 * 4 * weights
    return {"stored": stored, "read_later": later_epoch["bytes_read"]}


def fit(model: str, data: str, folder: str, **options: Any) -> lowmem_pnn.Result:
    """A run in this process, in `folder`/run; commits and lines in between are left out."""
    options = {"commit_every": 1e6, "log_every": 10**6, "device": "cpu", **options}
    return lowmem_pnn.fit(model, data, workdir=f"{folder}/run", **options)


def communication(cache: Cache, data: str, limit: int | None) -> tuple[str, dict[str, Any]]:
    """The page's first section."""
    splits = open_data(configure(max_gpu_mem=BUDGET, model="mlp:784-47", data=data, val_fraction=0, train_limit=limit)).splits
    images = len(splits["train"])
    rows: list[tuple[str, ...]] = []
    found: dict[int, Any] = {}
    for partitions, cuts in CUTS.items():
        place = {"data": data.rpartition("/")[2], "limit": limit, "partitions": partitions}
        counted = {
            (method, budget): cache.get(
                {"crossing": method, "budget": budget, **place},
                partial(count_crossings, data, limit, method, partitions, budget),
            )
            for method, budget in (("pnn", BUDGET), ("pnn", SMALL_BUDGET), ("exact", BUDGET))
        }
        each = 4 * sum(WIDTHS[cut] for cut in cuts)
        once, labels = images * each, 8 * len(cuts) * images
        exact, pnn, small = counted["exact", BUDGET], counted["pnn", BUDGET], counted["pnn", SMALL_BUDGET]
        found[partitions] = {
            "bytes_per_image": each,
            "once": once,
            "labels": labels,
            "exact": exact,
            "pnn": pnn,
            "pnn_small": small,
        }
        rows += [
            (
                str(partitions), "synthetic labels", "0", f"{once / MB:.1f}", f"{(pnn['stored'] - labels) / MB:.1f}",
                f"{pnn['stored'] - labels - once}", f"{once / MB:.1f}", "1",
            ),
            (
                str(partitions), "every step, both ways", f"{2 * once / MB:.1f}", "-", f"{(exact['forward'] + exact['back']) / MB:.1f}",
                f"{exact['forward'] + exact['back'] - 2 * once}", f"{2 * PAPER_EPOCHS * once / MB:.1f}", str(2 * PAPER_EPOCHS),
            ),
        ]  # fmt: skip
    heads = (
        "partitions", "what crosses", "MB an epoch", "MB once", "counted MB", "counted - computed, bytes",
        f"MB a run of {PAPER_EPOCHS} epochs", "ratio",
    )  # fmt: skip
    two, five = found[2], found[5]
    as_computed = all(
        entry["exact"]["forward"] + entry["exact"]["back"] == 2 * entry["once"]
        and 0 <= entry["pnn"]["stored"] - entry["labels"] - entry["once"] < entry["once"] / 1000
        for entry in found.values()
    )
    paper = PAPER_IMAGES * two["bytes_per_image"]
    reads = [f"{place[kind]['read_later'] / MB:.1f}" for kind in ("pnn", "pnn_small") for place in (two, five)]
    lines = [
        f"mlp:{'-'.join(map(str, WIDTHS))}, {images:,} images of {data.rpartition('/')[2]}, batch {RECIPE['batch_size']}, float32;",
        "cut after layer 2, or after each of layers 1 to 4. Computed from the shapes; counted in runs of `pnn` (what was written at the",
        "cuts) and of `exact` (every tensor that crossed a cut, per epoch).",
        "",
        f"- {'The claim holds' if as_computed else 'NOT AS COMPUTED'}. With synthetic labels a cut is crossed once, one way:",
        f"  1/{2 * PAPER_EPOCHS} of what {PAPER_EPOCHS} epochs of model parallelism send. The ratio is twice the epochs; the number of cuts and",
        "  the batch size do not enter.",
        f"- On the paper's {PAPER_IMAGES:,} images and one cut: {paper / MB:.1f} MB, against {2 * paper * PAPER_EPOCHS / MB:.0f} MB",
        f"  for the {PAPER_EPOCHS} epochs of its baseline.",
        f"- Counted without the images' labels, which are stored with them: {two['labels'] / MB:.1f} and {five['labels'] / MB:.1f} MB more.",
        "  The rest is headers of files.",
        "- Once is for a device that keeps what it got. Where that does not fit in its share of the budget it is read from the disk in",
        f"  every epoch, as training data are: {reads[0]} MB an epoch by the last of 2 partitions in a budget of {BUDGET}, {reads[2]} MB",
        f"  in {SMALL_BUDGET}. In the paper's 160 epochs of the right part that is {160 * two['pnn']['read_later'] / MB:.0f} MB,",
        f"  more than the {2 * PAPER_EPOCHS * two['once'] / MB:.0f} MB that its baseline's epochs send; but they come from a disk, ahead of",
        "  their use, and no device waits for another.",
        "- On one device `exact` moves weights and momentum too, in every step, and `pnn` does not:",
        f"  {two['exact']['weights_written'] / MB:.0f} MB written an epoch.",
        "",
        markdown_table(heads, rows),
    ]
    return "\n".join(lines), {"images": images, "partitions": found}


# 2. Device memory


def wide_peak(partitions: int, setting: Mapping[str, Any]) -> dict[str, Any]:
    """Peaks of the partitions, or of the whole where there is one, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = "mlp:" + "-".join(["64", *[str(setting["width"])] * setting["depth"], "10"])
        command = ["fit", "--max-gpu-mem", setting["budget"], "--device", "cpu", "--model", model, "--data", "digits"]
        command += ["--epochs", "1", "--lr", "1e-4", "--batch-size", str(setting["batch"])]
        command += ["--method", "backprop"] if partitions == 1 else ["--partitions", str(partitions), "--kappa", "1"]
        result = json.loads(run_process(command_line(*command, "--workdir", f"{folder}/run", "--json", "--quiet")).stdout)
    return {
        "peaks": [partition["peak_bytes"] for partition in result["partitions"]],
        "states": [partition["state_bytes"] for partition in result["partitions"]],
        "predicted": [partition["predicted_peak_bytes"] for partition in result["partitions"]],
        "micro_batches": [partition["micro_batch"] for partition in result["partitions"]],
    }


def memory(cache: Cache, setting: Mapping[str, Any], counts: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """The page's second section."""
    found = {count: cache.get({"memory": count, **setting}, partial(wide_peak, count, setting)) for count in (1, *counts)}
    whole = max(found[1]["peaks"])
    rows = [
        (
            str(count), f"{sum(entry['states']) / MB:.0f}", f"{max(entry['states']) / MB:.0f}", f"{max(entry['peaks']) / MB:.0f}",
            f"{min(entry['peaks']) / MB:.0f}", f"{max(entry['peaks']) / whole:.2f}", f"{1 / count:.2f}",
            f"{max(entry['states']) / sum(entry['states']):.2f}",
        )
        for count, entry in found.items()
    ]  # fmt: skip
    heads = (
        "partitions", "state of all MB", "largest state MB", "largest peak MB", "smallest peak MB", "peak / whole's", "1 / partitions",
        "largest state / all",
    )  # fmt: skip
    most = counts[-1]
    falls = all(max(found[few]["peaks"]) > max(found[many]["peaks"]) for few, many in pairwise(found))
    whole_batch = all(size == setting["batch"] for entry in found.values() for size in entry["micro_batches"])
    lines = [
        f"mlp:64-{setting['width']}x{setting['depth']}-10, AdamW, batch {setting['batch']}, digits, budget {setting['budget']}, so that",
        f"nothing has to shrink (the whole batch goes through at once in every run: {'yes' if whole_batch else 'NO'}). State is weights,",
        "gradients and moments. One partition is `backprop`. Peaks are private memory above the floor.",
        "",
        f"- {'The claim holds' if falls else 'NOT MET'}: the largest of {most} partitions needs",
        f"  {max(found[most]['peaks']) / whole:.0%} of the whole's peak.",
        "- It is more than one share: layers are not divided, and samples, outputs, codes and what kernels hold do not shrink with the",
        "  partition.",
        "",
        markdown_table(heads, rows),
    ]
    return "\n".join(lines), {"setting": dict(setting), "runs": found}


# 3. Vanishing gradients


def cuts_of(depth: int, partitions: int) -> tuple[int, ...]:
    """The hidden layers, from 1, that begin partitions of (nearly) equal depth."""
    return tuple(1 + round(depth * number / partitions) for number in range(1, partitions))


def train_deep(
    data: str, limit: int, network: Mapping[str, Any], partitions: int, optimizer: str, rates: Sequence[float], seed: int
) -> dict[str, Any]:
    """Train a deep network; the same epochs for every layer.

    Args:
        data: to train on.
        limit: training images.
        network: arguments of `deep_mlp`.
        partitions: 1 for backprop.
        optimizer: `sgd` with momentum 0.9, or `adam`.
        rates: the learning rate of backprop; or kappa, the rate for synthetic labels, and that for the true ones.
        seed: of the run.
    """
    options: dict[str, Any] = {
        "batch_size": DEEP_BATCH,
        "epochs": DEEP_EPOCHS,
        "optimizer": optimizer,
        "train_limit": limit,
        "seed": seed,
    }
    if partitions == 1:
        options |= {"method": "backprop", "lr": rates[0]}
    else:
        cuts = cuts_of(network["depth"], partitions)
        options |= {"kappa": rates[0], "lr": (*[rates[1]] * (partitions - 1), rates[2]), "cuts": [f"{layer}.0" for layer in cuts]}
    with tempfile.TemporaryDirectory() as folder:
        model = f"{HERE / 'networks.py'}:deep_mlp"
        try:
            result = fit(model, data, folder, max_gpu_mem="1GB", model_arg=dict(network), **options)
        except DivergedError:
            return {"val": 0.0, "test": 0.0, "seconds": 0.0, "diverged": True}
        figures: dict[str, Any] = {"val": result.val_accuracy, "test": result.test_accuracy, "seconds": result.seconds}
        if seed == 0:
            images, labels = sample_images(data)
            trained = load_file(result.weights_file)
            figures["norms"] = gradient_norms(network, partitions, rates[0], trained, images, labels)
    return figures


def sample_images(data: str) -> tuple[Tensor, Tensor]:
    """512 training images and their classes."""
    splits = open_data(configure(max_gpu_mem="1GB", model=f"{HERE / 'networks.py'}:deep_mlp", data=data)).splits
    return splits["train"].batch(np.arange(512))


def gradient_norms(
    network: Mapping[str, Any],
    partitions: int,
    kappa: float,
    trained: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
) -> list[list[float]]:
    """Norms of every layer's weight gradient when its partition begins to learn, by plain PyTorch.

    Args:
        network: arguments of `deep_mlp`.
        partitions: 1 for the whole.
        kappa: of the codes.
        trained: the weights of a finished run: a partition's inputs come through those before it.
        images: (B, ...).
        labels: (B,).

    Returns:
        A list per partition.
    """
    torch.manual_seed(0)
    fresh, done = deep_mlp(**network), deep_mlp(**network)
    done.load_state_dict(dict(trained))
    ends = [*cuts_of(network["depth"], partitions), len(fresh)]
    norms, inputs, start = [], images, 0
    for number, end in enumerate(ends):
        part = fresh[start:end]
        outputs = part(inputs)
        if end == len(fresh):
            loss = nn.functional.cross_entropy(outputs, labels)
        else:
            (codes,) = draw_class_vectors([tuple(outputs.shape[1:])], 47, kappa, seed=number)
            loss = nn.functional.mse_loss(outputs, codes[labels])
        loss.backward()
        norms.append([math.sqrt(w.grad.square().sum()) for w in part.parameters() if w.grad is not None and w.dim() == 2])
        with torch.no_grad():
            inputs = done[start:end](inputs)
        start = end
    return norms


def signal(network: Mapping[str, Any], images: Tensor) -> float:
    """How much the last hidden layer's outputs differ between images at initialisation, as a share of their size."""
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = deep_mlp(**network).double()[:-1](images.double())
    return float(outputs.std(0).mean() / outputs.abs().mean())


def vanishing(
    cache: Cache, data: str, limit: int, counts: Sequence[int], seeds: int, networks: Sequence[str], optimizers: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """The page's third section: of each method the best learning rates, by validation with the first seed, then all seeds."""
    images, _ = sample_images(data)
    found: dict[str, Any] = {}
    for name in networks:
        network = NETWORKS[name]
        found[name] = {"signal": signal(network, images), "runs": {}}
        for optimizer in optimizers:
            methods: list[tuple[str, int, dict[str, Any], Sequence[Sequence[float]]]] = [
                ("backprop", 1, network, [(rate,) for rate in BACKPROP_RATES[optimizer]]),
                *((f"pnn, {count} partitions", count, network, PNN_RATES[network["activation"], optimizer]) for count in counts),
                ("backprop, scaled start", 1, {**network, "scaled": True}, [(rate,) for rate in SCALED_RATES[optimizer]]),
            ]
            for method, count, arguments, grid in methods:
                place = {"network": arguments, "partitions": count, "optimizer": optimizer}

                def run(rates: Sequence[float], seed: int, place: dict[str, Any] = place) -> dict[str, Any]:
                    key = {"data": data.rpartition("/")[2], "limit": limit, **place, "rates": list(rates), "seed": seed}
                    return cache.get(key, partial(train_deep, data, limit, **place, rates=rates, seed=seed))

                best = max(grid, key=lambda rates: run(rates, 0)["val"])
                # One seed is enough to see nothing.
                runs = [run(best, seed) for seed in range(seeds if run(best, 0)["test"] > LEARNT else 1)]
                norms = runs[0].get("norms", [])
                found[name]["runs"][f"{method}, {optimizer}"] = {
                    "rates": best,
                    "val": 100 * runs[0]["val"],
                    "tests": [100 * one["test"] for one in runs],
                    "norms": norms,
                    "vanish": min((part[0] / part[-1] for part in norms if len(part) > 1), default=math.nan),
                }
    return vanishing_text(found, limit, seeds, optimizers), found


def vanishing_text(found: Mapping[str, Any], limit: int, seeds: int, optimizers: Sequence[str]) -> str:
    """What the third section says."""
    rows = []
    for name, entry in found.items():
        for key, run in entry["runs"].items():
            method, _, optimizer = key.rpartition(", ")
            rates = " / ".join(f"{rate:g}" for rate in run["rates"])
            tests = run["tests"]
            rows.append(
                (
                    name,
                    optimizer,
                    method,
                    rates,
                    f"{run['vanish']:.0e}",
                    f"{statistics.mean(tests):.1f}",
                    f"{statistics.pstdev(tests):.1f}" if len(tests) > 1 else "-",
                )
            )
    heads = (
        "hidden layers",
        "optimizer",
        "method",
        "lr, or kappa / lr / last lr",
        "gradient, first / last layer",
        "test %",
        "deviation",
    )
    lines = [
        f"EMNIST, 47 classes (chance is 2.1 %), {limit:,} images, a tenth of them to validate; hidden layers of 100, initialised as",
        f"PyTorch does by default, batch {DEEP_BATCH}, {DEEP_EPOCHS} epochs for every layer (about the same computation for all), {seeds}",
        "seed(s), or one where that was at chance. Learning rates, kappa, and below the number of partitions, are the best on the validation",
        "images; 3 or 4 learning rates were tried for each method (at the top of the bench's file). The gradient column is the norm of the",
        "first layer's weight gradient over that of the last layer's, before the first step; of partitions the smallest such ratio of any.",
        "`scaled start` is the ordinary remedy: initial weights that keep the signal's size (4 times Glorot's for sigmoid, He's for ReLU).",
        "",
    ]
    for name, entry in found.items():
        for optimizer in optimizers:
            runs = entry["runs"].items()
            mean = {key.rpartition(", ")[0]: statistics.mean(run["tests"]) for key, run in runs if key.endswith(optimizer)}
            vals = {key.rpartition(", ")[0]: run["val"] for key, run in runs if key.endswith(optimizer)}
            best = max((key for key in mean if key.startswith("pnn")), key=vals.__getitem__)
            lines.append(
                f"- {name}, {optimizer}: {'the claim holds' if mean[best] > mean['backprop'] + 2 else 'NOT SEEN'}. Backprop "
                f"{mean['backprop']:.1f} %, {best} {mean[best]:.1f} %. Backprop from a scaled start {mean['backprop, scaled start']:.1f} %."
            )
        lines.append(
            f"- {name}: before training the outputs of the last hidden layer differ from image to image by {entry['signal']:.0e} of their size; "
            "float32 resolves 6e-08. The signal vanishes as the gradient does; a partition's inputs come through layers that have learnt."
        )
    lines += [
        "- Partitions have to be shallow. Within one the gradients vanish as ever: the fewer there are, the worse they train (table).",
        "",
        markdown_table(heads, rows),
    ]
    return "\n".join(lines)


# The page


def draw(found: Mapping[str, Any], name: str) -> bool:
    """Four pictures in one; False where there is no matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return False
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9), constrained_layout=True)
    crossing, peaks, gradients, bars = axes.flat
    epochs = range(1, PAPER_EPOCHS + 1)
    for partitions, entry in found["communication"]["partitions"].items():
        once = entry["once"] / MB
        colour = {2: "C0", 5: "C1"}[int(partitions)]
        crossing.plot(epochs, [2 * once * epoch for epoch in epochs], colour, label=f"model parallelism, {partitions} partitions")
        crossing.plot(epochs, [once for _ in epochs], colour, linestyle="--", label=f"synthetic labels, {partitions} partitions")
    crossing.set(yscale="log", xlabel="epochs", ylabel="MB across all cuts", title="1. What crosses the cuts")
    crossing.legend(fontsize="small")

    runs = found["memory"]["runs"]
    names = [str(count) for count in runs]
    peaks.bar(names, [max(run["peaks"]) / MB for run in runs.values()], color="C0", label="largest partition's peak, measured")
    peaks.plot(
        names, [max(run["states"]) / MB for run in runs.values()], "k_", markersize=20, label="its weights, gradients and moments"
    )
    peaks.set(xlabel="partitions (1: backprop)", ylabel="MB", title="2. Device memory")
    peaks.legend(fontsize="small")

    deep = found["vanishing"]
    first, entry = next(iter(deep.items()))
    optimizers = list(dict.fromkeys(key.rpartition(", ")[2] for key in entry["runs"]))
    methods = list(dict.fromkeys(key.rpartition(", ")[0] for key in entry["runs"]))
    colours = {method: "0.6" if "scaled" in method else f"C{number}" for number, method in enumerate(methods)}
    for method in methods:
        layer = 1
        for number, part in enumerate(entry["runs"][f"{method}, {optimizers[-1]}"]["norms"]):
            label = None if number else method
            gradients.plot(range(layer, layer + len(part)), part, colours[method], marker="o", markersize=3, label=label)
            layer += len(part)
    gradients.set(
        yscale="log", xlabel="layer", ylabel="norm of its weight gradient", title=f"3. {first} layers, before the first step"
    )
    gradients.legend(fontsize="small")

    groups = [(network, optimizer) for network in deep for optimizer in optimizers]
    for number, method in enumerate(methods):
        values = [deep[network]["runs"][f"{method}, {optimizer}"]["tests"] for network, optimizer in groups]
        places = [at + 0.15 * (number - (len(methods) - 1) / 2) for at in range(len(groups))]
        heights, errors = [statistics.mean(tests) for tests in values], [statistics.pstdev(tests) for tests in values]
        bars.bar(places, heights, 0.15, yerr=errors, color=colours[method], label=method)
    bars.set_xticks(range(len(groups)), [f"{network}\n{optimizer}" for network, optimizer in groups])
    bars.axhline(100 / 47, color="k", linewidth=0.5)
    bars.set(ylabel="test accuracy, %", ylim=(0, 95), title="3. After the same epochs a layer (line: chance)")
    bars.legend(fontsize="small", ncols=2)
    figure.savefig(RESULTS / f"{name}.png", dpi=90)
    return True


def main() -> None:
    """Run all three sections and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=default_emnist(), help="28x28 images of 47 classes")
    parser.add_argument("--quick", action="store_true", help="less of everything: about three minutes")
    parser.add_argument("--again", action="store_true", help="forget the runs that are finished")
    arguments = parser.parse_args()
    quick, name = arguments.quick, "pnn_claims_quick" if arguments.quick else "pnn_claims"
    cache = Cache("pnn_claims", arguments.again)
    first, one = communication(cache, arguments.data, 7050 if quick else None)
    wide = {**WIDE, "width": 1024} if quick else WIDE
    second, two = memory(cache, wide, WIDE_PARTITIONS[-1:] if quick else WIDE_PARTITIONS)
    names = list(NETWORKS)[:1] if quick else list(NETWORKS)
    limit, counts, seeds, optimizers = (
        (DEEP_IMAGES // 2, (4,), 1, ["adam"]) if quick else (DEEP_IMAGES, DEEP_PARTITIONS, 3, ["sgd", "adam"])
    )
    third, three = vanishing(cache, arguments.data, limit, counts, seeds, names, optimizers)
    found = {"communication": one, "memory": two, "vanishing": three}
    text = "\n".join(
        [
            "The paper (arXiv 2403.11204, sections 1 and 2.1) says this of its method without figures. Here are figures.",
            emnist_in_words(arguments.data),
            *(["", f"![Four pictures of what the tables say]({name}.png)"] if draw(found, name) else []),
            "",
            "## 1. Communication: once, one way",
            "",
            first,
            "",
            "## 2. Device memory: a share of the whole",
            "",
            second,
            "",
            "## 3. Where gradients vanish",
            "",
            third,
        ]
    )
    write_results(name, "PNN's claims, measured", text, found, machines=cache.machines)


if __name__ == "__main__":
    main()
