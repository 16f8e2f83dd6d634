"""Ways to train faster (review, arXiv 2312.10024): gradient accumulation, mixed precision, both; and channels last.

ResNet-50, a vision transformer and EfficientNet on CIFAR-10 (and CIFAR-100 by --data): test accuracy and F1, seconds, losses with their
curves, and the speed-up against the same network without any of them. The review has no figures for a CPU; it says that accuracy stays
and that training is up to 2.5 times as fast on a GPU. Pinned memory, the third of its ways, is for copies to a GPU: on the CPU there are none.

    python bench/accelerations.py [--data npz:cifar10.npz,cifar100] [--device auto] [--full] [--quick] [--again]

The plain form is for one CPU core: 1,000 images, three epochs, about a quarter of an hour; --full takes all images, ten epochs, for a GPU.
Finished runs are kept in bench/.cache/.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from common import RESULTS, Cache, arguments_of, default_cifar10, lowmem_pnn, markdown_table, run_process, write_results

MB = 1e6
PAPER_SPEED_UP = 2.5
MICRO_BATCH, ACCUMULATED = 32, 128
# A batch that is several times as large takes fewer steps; its rate grows with its square root (Malladi et al. 2022, for Adam).
LR = 1e-3

OF_FEW_STEPS = "Accuracies after so few steps compare ways that take as many of them; they say nothing of what a network reaches."

NETWORKS: dict[str, dict[str, Any]] = {
    "ResNet-50": {"model": "resnet50"},
    "ViT, 4 blocks of 192": {"model": "networks:vit", "model_arg": {"depth": "4", "width": "192", "heads": "3"}},
    "EfficientNet-B0": {"model": "efficientnet_b0"},
}
BASE: dict[str, Any] = {"batch_size": MICRO_BATCH, "lr": LR}
ACCUMULATION: dict[str, Any] = {
    "batch_size": ACCUMULATED, "micro_batch": MICRO_BATCH, "lr": LR * (ACCUMULATED / MICRO_BATCH) ** 0.5,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "none": BASE,
    "accumulation": ACCUMULATION,
    "bf16": {**BASE, "precision": "bf16"},
    "channels last": {**BASE, "channels_last": True},
    "accumulation, bf16": {**ACCUMULATION, "precision": "bf16"},
    "accumulation, bf16, channels last": {**ACCUMULATION, "precision": "bf16", "channels_last": True},
}


def run(fields: dict[str, Any]) -> dict[str, Any]:
    """One run: scores, seconds of an epoch, and both losses by epoch."""
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name) / "run"
        command = lowmem_pnn("fit", "--json", "--quiet", "--workdir", str(workdir), *arguments_of(fields))
        done = run_process(command)
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    result = json.loads(done.stdout)
    epochs = [line for line in lines if "samples_per_second" in line]
    return {
        **{key: result[key] for key in ("test_accuracy", "test_f1", "seconds", "peak_bytes", "oom_retries", "device")},
        "samples_per_second": max(line["samples_per_second"] for line in epochs),
        "train_loss": [line["train_loss"] for line in epochs],
        "val_loss": [line["val_loss"] for line in epochs],
        "micro_batch": result["partitions"][0]["micro_batch"],
    }


def draw(found: dict[str, dict[str, dict[str, Any]]], path: Path) -> bool:
    """Both losses by epoch, a column per network, where there is matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib import ticker  # type: ignore[import-not-found, unused-ignore]
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

    figure = Figure(figsize=(4.5 * len(found), 7), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False)
    for column, (network, variants) in enumerate(found.items()):
        for row, key in enumerate(("train_loss", "val_loss")):
            for variant, own in variants.items():
                axes[row][column].plot(range(1, 1 + len(own[key])), own[key], "o-", label=variant)
            axes[row][column].xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
            axes[row][column].set(title=network, xlabel="epoch", ylabel="training loss" if row == 0 else "validation loss")
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=90)
    return True


def table_of(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row per network and variant."""
    heads = (
        "network", "with", "samples/s", "speed-up", "test %", "points", "F1", "training loss", "validation loss", "peak MB",
    )  # fmt: skip
    rows = []
    for network, variants in found.items():
        base = variants["none"]
        for variant, own in variants.items():
            rows.append(
                (
                    network, variant, f"{own['samples_per_second']:.0f}", f"{own['samples_per_second'] / base['samples_per_second']:.2f}",
                    f"{100 * own['test_accuracy']:.1f}", f"{100 * (own['test_accuracy'] - base['test_accuracy']):+.1f}",
                    f"{own['test_f1']:.3f}", f"{own['train_loss'][-1]:.3f}", f"{own['val_loss'][-1]:.3f}", f"{own['peak_bytes'] / MB:.0f}",
                )
            )  # fmt: skip
    return markdown_table(heads, rows)


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=default_cifar10(), help="comma list of data sets of 32x32 images in colour")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget", default="3GB")
    parser.add_argument("--full", action="store_true", help="all images, ten epochs: for a GPU")
    parser.add_argument("--quick", action="store_true", help="EfficientNet on 256 images, one epoch; writes no page")
    parser.add_argument("--again", action="store_true", help="forget the runs that are finished")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    limits: dict[str, Any] = {} if arguments.full else {"train_limit": 1000, "test_limit": 1000}
    epochs, networks = 10 if arguments.full else 3, NETWORKS
    if arguments.quick:
        limits, epochs = {"train_limit": 256, "test_limit": 100}, 1
        networks = {"EfficientNet-B0": NETWORKS["EfficientNet-B0"]}
    cache = Cache("accelerations_quick" if arguments.quick else "accelerations", arguments.again)
    lines, kept = [], {}
    for data in arguments.data.split(","):
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for network, model in networks.items():
            for variant, options in VARIANTS.items():
                fields = {
                    **model, **options, **limits, "data": data, "epochs": epochs, "method": "backprop", "device": arguments.device,
                    "max_gpu_mem": arguments.budget, "commit_every": 1_000_000,
                }  # fmt: skip
                key = {**fields, "data": Path(data).name}
                found.setdefault(network, {})[variant] = cache.get(key, partial(run, fields))
        name = Path(data.partition(":")[2] or data).stem
        kept[name] = found
        where = next(iter(next(iter(found.values())).values()))["device"]
        size = ", ".join(f"{value} images to {key.partition('_')[0]} on" for key, value in limits.items()) or "all images"
        lines += [
            f"## {name}, on {where}: {size}, {epochs} epoch(s)",
            "",
            f"AdamW, learning rate {LR:g} for {MICRO_BATCH} samples a step. Accumulation is of {ACCUMULATED} samples, {MICRO_BATCH} at a "
            "time. The fastest epoch counts.",
            *([OF_FEW_STEPS] if limits else []),
            "",
            table_of(found),
            "",
        ]
        picture = f"accelerations_{name}.png"
        if not arguments.quick and draw(found, RESULTS / picture):
            lines += [f"![training and validation loss by epoch]({picture})", ""]
        best = {
            network: max(own["samples_per_second"] for own in variants.values()) / variants["none"]["samples_per_second"]
            for network, variants in found.items()
        }
        words = ", ".join(f"{network} {ratio:.2f}" for network, ratio in best.items())
        here = "the best here, of one run each, in which a tenth is noise"
        lines += [f"- up to {PAPER_SPEED_UP} times as fast (the review, on a GPU); {here}: {words}", ""]
    if arguments.quick:
        print("\n".join(lines))
        return
    title = "Accelerations: accumulation, mixed precision, channels last"
    write_results("accelerations", title, "\n".join(lines), kept, machines=cache.machines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
