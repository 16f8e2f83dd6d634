"""Fine-tuning a pretrained network on a folder of images, in a third of plain PyTorch's memory, beside plain PyTorch.

MobileNetV2 with ImageNet's weights learns the ten classes of CIFAR-10, of which 2,000 training and 2,000 test images are written as PNG
of 96x96: three epochs with its features frozen, then three with all of it (features at a tenth of the rate), BatchNorms frozen
throughout. Compared are test accuracy (mean over seeds), the peak of private memory above imports, and seconds of an epoch: the outputs
of the frozen features are written once, and read in the epochs in which they are frozen.

    python bench/finetuning.py [--data npz:cifar10.npz] [--weights FILE|default] [--seeds 3] [--quick] [--again]

Half an hour on two cores; --quick takes 200 images, one seed and two epochs of each kind. The page is written after every seed, and
finished runs are kept in bench/.cache/.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import Cache, StepMeter, arguments_of, default_cifar10, lowmem_pnn, markdown_table, run_process, write_results

MB = 1e6
SIDE, BATCH, LR = 96, 64, 1e-3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_folder(data: str, count: int, folder: Path) -> None:
    """Write the first `count` images of each part as PNG, enlarged to 96x96, in a folder for each class."""
    from PIL import Image

    arrays = np.load(data.removeprefix("npz:"))
    for part in ("train", "test"):
        images, labels = arrays[f"x_{part}"][:count], arrays[f"y_{part}"][:count]
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / part / str(label) / f"{number:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(path)


def default_weights() -> str:
    """The file of ImageNet's weights where there is one, else what torchvision downloads."""
    folder = os.environ.get("LOWMEM_PNN_DATA")
    file = Path(folder) / "mobilenet_v2-imagenet.safetensors" if folder else None
    return str(file) if file is not None and file.exists() else "default"


def ours(folder: Path, weights: str, frozen: int, epochs: int, seed: int, budget: int) -> dict[str, Any]:
    """One run of the command."""
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name) / "run"
        fields = {
            "model": "mobilenet_v2", "weights": weights, "data": f"imagefolder:{folder}", "normalize": "imagenet", "freeze": "features.*",
            "unfreeze_at": frozen, "freeze_norm": True, "lr_for": {"features.*": LR / 10},
            "epochs": epochs, "batch_size": BATCH, "lr": LR, "seed": seed, "val_fraction": 0,
            "max_gpu_mem": budget, "device": "cpu",
        }  # fmt: skip
        done = run_process(lowmem_pnn("fit", "--json", "--quiet", "--workdir", str(workdir), *arguments_of(fields)))
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    result = json.loads(done.stdout)
    speeds = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    return {
        "accuracy": result["test_accuracy"],
        "peak": result["peak_bytes"],
        "predicted": result["predicted_peak_bytes"],
        "speeds": speeds,
        "seconds": result["seconds"],
    }


def plain(folder: str, weights: str, frozen: int, epochs: int, seed: int) -> None:
    """The loop that everybody writes, in this process; prints its figures as JSON."""
    import time

    import torch
    import torchvision
    from safetensors.torch import load_file
    from torch import nn
    from torchvision.transforms import v2

    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    parts = {part: torchvision.datasets.ImageFolder(f"{folder}/{part}", v2.Compose(steps)) for part in ("train", "test")}
    meter = StepMeter()
    meter.begin()
    torch.manual_seed(seed)
    model = torchvision.models.mobilenet_v2(weights="DEFAULT" if weights == "default" else None)
    if weights != "default":
        model.load_state_dict(load_file(weights), strict=True)
    model.classifier[1] = nn.Linear(model.last_channel, len(parts["train"].classes))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    speeds, started = [], time.monotonic()
    for epoch in range(epochs):
        if epoch in (0, frozen):
            model.features.requires_grad_(epoch > 0)
            for parameter in (parameter for norm in norms for parameter in norm.parameters()):
                parameter.requires_grad_(False)
            if epoch == 0:
                rates = ((model.features, LR / 10), (model.classifier, LR))
                groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in rates]
                optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        model.train()
        for norm in norms:
            norm.eval()
        began, loader = time.monotonic(), torch.utils.data.DataLoader(parts["train"], BATCH, shuffle=True)
        for x, y in loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        speeds.append(len(parts["train"]) / (time.monotonic() - began))
    peak, seconds = meter.peak_private_bytes, time.monotonic() - started
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in torch.utils.data.DataLoader(parts["test"], BATCH))
    print(json.dumps({"accuracy": right / len(parts["test"]), "peak": peak, "speeds": speeds, "seconds": seconds}))


def page(found: dict[str, list[dict[str, Any]]], frozen: int, budget: int, count: int) -> str:
    """The table, and what it says."""
    rows = []
    for name, runs in found.items():
        accuracies = [run["accuracy"] for run in runs]
        later = statistics.mean(statistics.mean(run["speeds"][1:frozen]) for run in runs)
        whole = statistics.mean(statistics.mean(run["speeds"][frozen:]) for run in runs)
        spread = statistics.stdev(accuracies) if len(runs) > 1 else 0.0
        rows.append([
            name, f"{statistics.mean(accuracies):.1%} ({spread:.1%})", f"{max(run['peak'] for run in runs) / MB:.0f}",
            f"{count / statistics.mean(run['speeds'][0] for run in runs):.1f}", f"{count / later:.1f}", f"{count / whole:.1f}",
            f"{later / whole:.1f}", f"{statistics.mean(run['seconds'] for run in runs):.0f}",
        ])  # fmt: skip
    heads = (
        "", "test accuracy (deviation)", "peak, MB", "first frozen epoch, s", "later frozen epochs, s", "epochs of all, s",
        "frozen / all, speed", "all of it, s",
    )  # fmt: skip
    own, theirs = found["lowmem-pnn, exact"], found["plain PyTorch"]
    gap = statistics.mean(run["accuracy"] for run in own) - statistics.mean(run["accuracy"] for run in theirs)
    share = max(run["peak"] for run in own) / max(run["peak"] for run in theirs)
    return (
        f"{markdown_table(heads, rows)}\n\nBudget {budget / MB:.0f} MB, a third of plain PyTorch's peak; the peak is {share:.2f} of it. Test "
        f"accuracy is {100 * gap:+.1f} points beside plain PyTorch's. Plain PyTorch's frozen features run forward in every "
        "epoch; here they run once, before the first, which the last column counts."
    )


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=default_cifar10())
    parser.add_argument("--weights", default=default_weights())
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="200 images, one seed, two epochs of each kind; writes no page")
    parser.add_argument("--again", action="store_true", help="forget the runs that are finished")
    parser.add_argument("--plain", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plain:
        folder, weights, *numbers = given.plain
        plain(folder, weights, *map(int, numbers))
        return
    if not given.data.startswith("npz:"):
        sys.exit("give --data npz:FILE with CIFAR-10's images (x_train, y_train, x_test, y_test)")
    count, frozen, epochs, seeds = (200, 2, 4, 1) if given.quick else (2000, 3, 6, given.seeds)
    cache = Cache("finetuning", given.again)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        write_folder(given.data, count, folder)
        found: dict[str, list[dict[str, Any]]] = {"plain PyTorch": [], "lowmem-pnn, exact": []}
        key = {"count": count, "frozen": frozen, "epochs": epochs}
        for seed in range(seeds):

            def run_plain(seed: int = seed) -> dict[str, Any]:
                command = [sys.executable, __file__, "--plain", str(folder), given.weights, str(frozen), str(epochs), str(seed)]
                figures: dict[str, Any] = json.loads(run_process(command).stdout)
                return figures

            found["plain PyTorch"].append(cache.get({**key, "seed": seed, "plain": True}, run_plain))
            budget = max(run["peak"] for run in found["plain PyTorch"][:1]) // 3

            def run_ours(seed: int = seed, budget: int = budget) -> dict[str, Any]:
                return ours(folder, given.weights, frozen, epochs, seed, budget)

            found["lowmem-pnn, exact"].append(cache.get({**key, "seed": seed, "budget": budget}, run_ours))
            text = page(found, frozen, budget, count)
            if not given.quick:
                title = (
                    f"Fine-tuning MobileNetV2 on images of CIFAR-10, {SIDE}x{SIDE}, batch {BATCH}, {seed + 1} of {seeds} seeds"
                )
                write_results("finetuning", title, text, {"runs": found, "budget_bytes": budget}, quiet=True)
        print(text)


if __name__ == "__main__":
    main()
