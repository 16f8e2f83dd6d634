"""Which classifiers of torchvision and timm train in a half, a third, a quarter of the memory that plain PyTorch needs?

For each network (random images of 64x64, or the smallest that it takes; batch 16; AdamW; CPU): into how many layers it is cut, what
share of its weights the largest one has, whether one step of `exact` gives the bits of plain PyTorch's, whether the trained weights load
strictly into the user's own network and score what was reported; then `fit --method exact` in 1/4, 1/3 and 1/2 of plain PyTorch's peak,
with predicted / measured in the tightest one that trains. Beside it, the peak of plain PyTorch with one sample at a time and
accumulation, which gives BatchNorm one sample to see. Everything in a process of its own.

    python bench/model_coverage.py [--quick] [--names resnet18,timm:resnet10t] [--again]

Needs timm. Two hours on two cores; --quick takes four networks. Networks that are done are kept in bench/.cache/.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

from classifiers import CLASSES, MORE_TIMM, TIMM, TORCHVISION, builder_of, shape_of, side_of
from common import Cache, markdown_table, run_process, write_results

BATCH, SEED, LR = 16, 0, 1e-3
MB = 1e6
FRACTIONS = (Fraction(1, 4), Fraction(1, 3), Fraction(1, 2))
QUICK = ("resnet18", "mobilenet_v2", "vit_b_16", "timm:resnet10t")


def data_of(name: str, batches: int) -> Any:
    """Return random samples and labels."""
    import torch

    count = BATCH * batches
    x = torch.rand(count, *shape_of(name), generator=torch.Generator().manual_seed(0))
    return x, torch.arange(count) % CLASSES


def seeded_step(name: str, rows: Any, micro_batch: int) -> tuple[Any, Any]:
    """Build a network and take one step of plain PyTorch; return it and its loss.

    Args:
        name: the network.
        rows: samples and labels.
        micro_batch: samples at once.
    """
    import torch

    from lowmem_pnn.seeds import seed_of

    torch.manual_seed(SEED)
    model = builder_of(name)().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    x, y = rows
    total = 0.0
    for number, start in enumerate(range(0, len(y), micro_batch)):
        torch.manual_seed(seed_of(SEED, "forward", 0, 0, number))
        part = slice(start, start + micro_batch)
        loss = torch.nn.functional.cross_entropy(model(x[part]), y[part])
        share = len(y[part]) / len(y)
        (loss * share if share != 1 else loss).backward()
        total += float(loss.detach()) * share
    optimizer.step()
    return model, total


def plain(name: str, micro_batch: int) -> dict[str, Any]:
    """Take two steps of plain PyTorch and return their peak of private memory above imports."""
    import torch

    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.device import CpuDevice

    config = configure(max_gpu_mem="1TB", model="mlp:1-1-1", data="digits")
    x, y = data_of(name, 2)
    with CpuDevice(config.max_gpu_mem) as device:
        model = builder_of(name)().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
        try:
            for step in range(2):
                for start in range(step * BATCH, step * BATCH + BATCH, micro_batch):
                    part = slice(start, start + micro_batch)
                    loss = torch.nn.functional.cross_entropy(model(x[part]), y[part])
                    (loss * (micro_batch / BATCH)).backward()
                optimizer.step()
                optimizer.zero_grad()
        except ValueError as error:  # BatchNorm of one value
            return {"refused": str(error)}
        return {"peak": device.peak_bytes}


def structure(name: str) -> dict[str, Any]:
    """Cut a network, train one step by `exact` with all memory, and hold it against plain PyTorch."""
    import torch
    from safetensors.torch import load_file

    import lowmem_pnn
    from lowmem_pnn.model.chain import TensorSpec, capture
    from lowmem_pnn.seeds import permutation_of

    x, y = data_of(name, 1)
    chain = capture(builder_of(name)(), TensorSpec(shape_of(name), torch.float32))
    sizes = [sum(p.numel() for p in layer.parameters().values()) for layer in chain.layers]
    found: dict[str, Any] = {"layers": len(chain.layers), "largest": max(sizes) / sum(sizes)}
    # The tightest cut: a partition for every layer.
    cuts = ",".join(str(number) for number in range(1, len(chain.layers)))
    with tempfile.TemporaryDirectory() as folder:
        result = lowmem_pnn.fit(
            builder_of(name), (x, y), test=(x, y), method="exact", max_gpu_mem="12GB", device="cpu", batch_size=BATCH, micro_batch=BATCH,
            epochs=1, lr=LR, seed=SEED, val_fraction=0.0, cuts=cuts or None, workdir=f"{folder}/run",
        )  # fmt: skip
        ours = load_file(result.weights_file)
        fresh = builder_of(name)().eval()
        fresh.load_state_dict(ours, strict=True)
    order = permutation_of(BATCH, SEED, "epoch", 0)
    model, _ = seeded_step(name, (x[order], y[order]), BATCH)
    theirs = model.state_dict()
    found["equal"] = all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items() if key in ours)
    found["largest_difference"] = max(float((tensor.double() - ours[key].double()).abs().max()) for key, tensor in theirs.items())
    with torch.no_grad():
        loss = float(torch.nn.functional.cross_entropy(fresh(x), y))
    found["scores"] = abs(loss - result.scores["test"]["loss"]) <= 1e-3 * abs(loss)
    return found


def fit(name: str, budget: int) -> dict[str, Any]:
    """Train two batches within a budget."""
    import lowmem_pnn
    from lowmem_pnn.errors import BudgetError

    with tempfile.TemporaryDirectory() as folder:
        try:
            result = lowmem_pnn.fit(
                builder_of(name), data_of(name, 2), method="exact", max_gpu_mem=str(budget), device="cpu", batch_size=BATCH, epochs=1,
                val_fraction=0.0, workdir=f"{folder}/run",
            )  # fmt: skip
        except BudgetError as error:
            return {"refused": str(error)}
    return {
        "predicted": result.predicted_peak_bytes,
        "peak": result.peak_bytes,
        "micro_batch": min(part["micro_batch"] for part in result.partitions),
        "partitions": len(result.partitions),
    }


def measure(name: str) -> dict[str, Any]:
    """Measure a network in processes of its own."""

    def work(kind: str, value: int = 0) -> dict[str, Any]:
        try:
            done = run_process([sys.executable, __file__, "--work", name, kind, str(value)])
        except RuntimeError as error:
            return {"failed": str(error)}
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    whole = work("plain", BATCH)
    found = {"structure": work("structure"), "plain": whole, "accumulated": work("plain", 1), "fits": {}}
    for fraction in FRACTIONS:
        found["fits"][str(fraction)] = work("fit", int(whole["peak"] * fraction))
        if "peak" in found["fits"][str(fraction)]:
            break  # What trains in less trains in more.
    return found


def row_of(name: str, found: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return a network's line, and what is counted of it."""
    parts, whole = found["structure"], found["plain"]["peak"]
    trained = next((key for key in found["fits"] if "peak" in found["fits"][key]), None)
    fits = found["fits"].get(trained or "", {})
    cells = [name, str(side_of(name)), str(parts.get("layers", "-")), f"{parts['largest']:.0%}" if "largest" in parts else "-"]
    equal = "yes" if parts.get("equal") else f"to {parts['largest_difference']:.0e}" if "largest_difference" in parts else "no"
    cells += [equal, "yes" if parts.get("scores") else "no", f"{whole / MB:.0f}"]
    for fraction in FRACTIONS:
        key = str(fraction)
        cells.append("yes" if trained is not None and Fraction(trained) <= fraction else "no" if key in found["fits"] else "-")
    cells.append(f"{fits['predicted'] / fits['peak']:.2f}" if fits else "-")
    one = found["accumulated"].get("peak")
    cells.append(f"{one / whole:.2f}" if one else "fails")
    return cells, {
        "captured": parts.get("layers", 0) > 2 and "failed" not in parts,
        "equal": bool(parts.get("equal")),
        "third": trained is not None and Fraction(trained) <= Fraction(1, 3),
        "over": bool(fits) and fits["peak"] > whole * Fraction(trained or 1),
        "accumulated_third": bool(one) and one * 3 <= whole,
    }


def main() -> None:
    """Measure the networks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--names")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, kind, value = arguments.work
        print(json.dumps({"plain": plain, "fit": fit}[kind](name, int(value)) if kind != "structure" else structure(name)))
        return
    names = arguments.names.split(",") if arguments.names else QUICK if arguments.quick else (*TORCHVISION, *TIMM, *MORE_TIMM)
    cache = Cache("model_coverage", arguments.again)
    rows, counts, data = [], [], []
    for name in names:
        try:
            found = cache.get({"name": name}, lambda name=name: measure(name))  # type: ignore[misc]
        except (RuntimeError, KeyError, subprocess.SubprocessError) as error:
            print(f"{name}: {error!r}", file=sys.stderr, flush=True)
            continue
        cells, counted = row_of(name, found)
        rows.append(cells)
        counts.append(counted)
        data.append({"name": name, **found})
        print(*cells, sep="\t", file=sys.stderr, flush=True)
    heads = (
        "network", "side", "layers", "largest layer", "step equal", "loads, scores", "plain MB", "1/4", "1/3", "1/2",
        "predicted / measured", "plain, one sample at a time",
    )  # fmt: skip

    def count(key: str) -> int:
        return sum(entry[key] for entry in counts)

    text = "\n".join(
        [
            f"Batch {BATCH}, AdamW, CPU. Peaks are private memory above imports. `step equal`: one step of `exact`, a partition for every",
            "layer, the whole batch at once, beside plain PyTorch. `1/4`, `1/3`, `1/2`: whether two steps of `exact` train in that share of",
            "plain PyTorch's peak (in micro-batches as planned). The last column is the peak of plain PyTorch with one sample at a time and",
            "accumulation, as a share of its peak with the batch at once; it fails where BatchNorm gets one value.",
            "",
            markdown_table(heads, rows),
            "",
            f"- captured in more than two layers: {count('captured')} of {len(counts)} (goal: 95 %)",
            f"- step bit-equal to plain PyTorch's: {count('equal')} of {len(counts)}",
            f"- trains in a third of plain PyTorch's peak: {count('third')} of {len(counts)}; plain with one sample at a time: "
            f"{count('accumulated_third')}",
            f"- peaks above the budget: {count('over')}",
        ]
    )
    write_results("model_coverage", "Classifiers in a part of plain PyTorch's memory", text, {"networks": data})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
