"""Which classifiers of torchvision and timm train in a half, a third, a quarter of the memory that plain PyTorch needs?

For each network (random images of 64x64, or the smallest that it takes; batch 16; AdamW; CPU): into how many layers it is cut, what
share of its weights the largest one has, whether one step of `exact` gives the bits of plain PyTorch's, whether the trained weights load
strictly into the user's own network and score what was reported; then two steps by `fit --method exact` in the smallest budget that `plan`
names, and its predicted / measured peak. Beside it, the peak of plain PyTorch with one sample at a time and accumulation, which gives
BatchNorm one sample to see. Every measurement is a process of its own, forked before anything but imports happened.

    python bench/model_coverage.py [--quick] [--names resnet18,timm:resnet10t] [--again]

Needs timm. An hour on two cores; --quick takes four networks. The page is written after every network, and networks that are done are
kept in bench/.cache/.
"""

import argparse
import multiprocessing
import re
import sys
import tempfile
from fractions import Fraction
from multiprocessing.connection import Connection
from typing import Any

from classifiers import CLASSES, MORE_TIMM, TIMM, TORCHVISION, builder_of, shape_of, side_of
from common import Cache, markdown_table, write_results

BATCH, SEED, LR = 16, 0, 1e-3
MB = 1e6
FRACTIONS = (Fraction(1, 4), Fraction(1, 3), Fraction(1, 2))
# Goal for predicted / measured.
LEAST, MOST = 0.9, 1.15
HEADS = (
    "network", "side", "layers", "largest layer", "step equal", "loads, scores", "plain MB", "smallest budget MB", "1/4", "1/3", "1/2",
    "predicted / measured", "measured / budget", "micro-batch", "plain, one sample at a time",
)  # fmt: skip
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


def structure(name: str, layers: int) -> dict[str, Any]:
    """Train one step by `exact` with a partition for each layer and all memory, and hold it against plain PyTorch.

    Args:
        name: the network.
        layers: how many layers it is cut into.
    """
    import torch
    from safetensors.torch import load_file

    import lowmem_pnn
    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.seeds import permutation_of
    from lowmem_pnn.sources.datasets import make_dataset
    from lowmem_pnn.workload.inputs import split_data

    x, y = data_of(name, 1)
    cuts = ",".join(map(str, range(1, layers)))
    with tempfile.TemporaryDirectory() as folder:
        result = lowmem_pnn.fit(
            builder_of(name), (x, y), test=(x, y), method="exact", max_gpu_mem="12GB", device="cpu", batch_size=BATCH, micro_batch=BATCH,
            epochs=1, lr=LR, seed=SEED, val_fraction=0.0, cuts=cuts or None, compare=False, workdir=f"{folder}/run",
        )  # fmt: skip
        ours = load_file(result.weights_file)
        fresh = lowmem_pnn.load_weights(builder_of(name)(), result.weights_file).eval()
    # The run's own training part, in the order of its first epoch.
    config = configure(max_gpu_mem="12GB", model="python:model", data="python:data", seed=SEED, val_fraction=0.0)
    part = split_data(make_dataset((x, y), name="data"), config)[1]["train"]
    model, _ = seeded_step(name, part.batch(permutation_of(BATCH, SEED, "epoch", 0)), BATCH)
    theirs = model.state_dict()
    found: dict[str, Any] = {"equal": all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items())}
    found["largest_difference"] = max(float((tensor.double() - ours[key].double()).abs().max()) for key, tensor in theirs.items())
    with torch.no_grad():
        loss = float(torch.nn.functional.cross_entropy(fresh(x), y))
    found["scores"] = abs(loss - result.scores["test"]["loss"]) <= 1e-3 * abs(loss)
    return found


def captured(name: str) -> dict[str, Any]:
    """Cut a network into layers."""
    import torch

    from lowmem_pnn.capture.capture import capture
    from lowmem_pnn.model.chain import TensorSpec

    chain = capture(builder_of(name)(), TensorSpec(shape_of(name), torch.float32))
    sizes = [sum(parameter.numel() for parameter in layer.parameters().values()) for layer in chain.layers]
    return {"layers": len(sizes), "largest": max(sizes) / sum(sizes)}


def smallest(name: str) -> dict[str, Any]:
    """Ask `plan` for the smallest budget, in bytes."""
    import lowmem_pnn

    report = lowmem_pnn.plan(
        builder_of(name),
        data_of(name, 2),
        method="exact",
        max_gpu_mem="6MB",
        device="cpu",
        batch_size=BATCH,
        val_fraction=0.0,
        timing=False,
    )
    named = re.search(r"--max-gpu-mem (\d+)MB", report.reason)
    return {"bytes": int(named[1] if named else 6) * 10**6, "reason": report.reason}


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
            return {"budget": budget, "refused": str(error)}
    return {
        "budget": budget,
        "predicted": result.predicted_peak_bytes,
        "peak": result.peak_bytes,
        "micro_batch": min(part["micro_batch"] for part in result.partitions),
        "partitions": len(result.partitions),
        "batches_done_again": result.oom_retries,
    }


WORK = {"captured": captured, "plain": plain, "structure": structure, "smallest": smallest, "fit": fit}


def answer(kind: str, arguments: tuple[Any, ...], sender: Connection) -> None:
    """Measure in this process, and send what was found or what went wrong."""
    try:
        sender.send(WORK[kind](*arguments))
    except Exception as error:
        lines = str(error).splitlines()
        sender.send({"failed": f"{type(error).__name__}: {lines[0] if lines else ''}"})


def work(kind: str, name: str, *values: int) -> dict[str, Any]:
    """Measure in a process of its own that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "timm", "safetensors.torch", "lowmem_pnn.api", "lowmem_pnn.device"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(kind, (name, *values), sender))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        return {"failed": f"exit code {process.exitcode}"}
    process.join()
    return found


def measure(name: str, layers: int) -> dict[str, Any]:
    """Measure a network that is cut into so many layers."""
    whole, named = work("plain", name, BATCH), work("smallest", name)
    fits: list[dict[str, Any]] = []
    budgets = [named["bytes"]] if "bytes" in named else []
    budgets += [int(whole["peak"] * share) for share in FRACTIONS if "peak" in whole]
    for budget in sorted(budget for budget in budgets if budget >= budgets[0]):
        fits.append(work("fit", name, budget))
        if "peak" in fits[-1]:
            break  # What trains in less trains in more.
    parts, one = work("structure", name, layers), work("plain", name, 1)
    return {"structure": parts, "plain": whole, "accumulated": one, "smallest": named, "fits": fits}


def row_of(name: str, found: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return a network's line, and what is counted of it; where nothing but its layers is known, these alone."""
    cut = found["captured"]
    cells = [name, str(side_of(name)), str(cut.get("layers", "-")), f"{cut['largest']:.0%}" if "largest" in cut else "-"]
    if "plain" not in found:
        return [*cells, *["-"] * (len(HEADS) - len(cells))], {"captured": cut.get("layers", 0) > 2}
    parts, whole, one = found["structure"], found["plain"].get("peak"), found["accumulated"].get("peak")
    fits = next((run for run in found["fits"] if "peak" in run), None)
    ratio = fits["predicted"] / fits["peak"] if fits else 0.0
    trains = {share: bool(fits and whole and fits["budget"] <= whole * share) for share in FRACTIONS}
    equal = "yes" if parts.get("equal") else f"to {parts['largest_difference']:.0e}" if "largest_difference" in parts else "no"
    cells += [equal, "yes" if parts.get("scores") else "no", f"{whole / MB:.0f}" if whole else "-"]
    cells += [f"{found['smallest']['bytes'] / MB:.0f}" if "bytes" in found["smallest"] else "-"]
    cells += ["yes" if trains[share] else "no" for share in FRACTIONS]
    cells += [f"{ratio:.2f}", f"{fits['peak'] / fits['budget']:.2f}", str(fits["micro_batch"])] if fits else ["-"] * 3
    cells += [f"{one / whole:.2f}" if one and whole else "fails"]
    return cells, {
        "captured": cut.get("layers", 0) > 2,
        "equal": bool(parts.get("equal")),
        "scores": bool(parts.get("scores")),
        **{str(share): trains[share] for share in FRACTIONS},
        "ratio": LEAST <= ratio <= MOST,
        "over": bool(fits) and fits["peak"] > fits["budget"],
        "at_named": bool(fits) and fits["budget"] == found["smallest"].get("bytes"),
        "accumulated": bool(one and whole) and one * 3 <= whole,
    }


def page(networks: dict[str, dict[str, Any]]) -> str:
    """Return the table, and what is counted in it."""
    rows, counts = zip(*(row_of(name, found) for name, found in networks.items()), strict=True)

    def count(key: str) -> str:
        known = [entry[key] for entry in counts if key in entry]
        return f"{sum(known)} of {len(known)}"

    troubles = [
        f"- {name}: {part}: {what}"
        for name, found in networks.items()
        for part, entry in [
            *((key, found[key]) for key in ("captured", "structure", "plain", "smallest") if key in found),
            *(("fit", run) for run in found.get("fits", ())),
        ]
        for what in (entry.get("failed"), entry.get("refused"))
        if what
    ]
    lines = [
        f"Batch {BATCH}, AdamW, CPU. Peaks are private memory above imports. `step equal`: one step of `exact`, a partition for every",
        "layer, the whole batch at once, beside plain PyTorch. `smallest budget`: what `plan` names; two steps of `exact` are trained there, in",
        "micro-batches as planned, and peaks are those of this run. `1/4`, `1/3`, `1/2`: whether the budget in which it trained is at most",
        "that share of plain PyTorch's peak. The last column is the peak of plain PyTorch with one sample at a time and accumulation, as a",
        "share of its peak with the batch at once; it fails where BatchNorm gets one value.",
        "",
        markdown_table(HEADS, rows),
        "",
        f"- captured in more than two layers: {count('captured')} (goal: 95 %)",
        f"- step bit-equal to plain PyTorch's: {count('equal')}",
        f"- trained weights load strictly, and score what was reported: {count('scores')}",
        f"- trains in the smallest budget that `plan` names: {count('at_named')}",
        f"- trains in a half of plain PyTorch's peak: {count('1/2')}; in a third: {count('1/3')}; in a quarter: {count('1/4')}",
        f"- plain PyTorch with one sample at a time needs at most a third: {count('accumulated')}",
        f"- predicted / measured within {LEAST} to {MOST}: {count('ratio')}",
        f"- peaks above the budget: {count('over')}",
    ]
    return "\n".join([*lines, *(["", "What failed or was refused:", "", *troubles] if troubles else [])])


def main() -> None:
    """Measure the networks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four networks; writes no page")
    parser.add_argument("--names", help="comma list of networks; writes no page")
    parser.add_argument("--again", action="store_true", help="forget the networks that were measured before")
    arguments = parser.parse_args()
    names = arguments.names.split(",") if arguments.names else QUICK if arguments.quick else (*TORCHVISION, *TIMM, *MORE_TIMM)
    captures, cache = (Cache(f"model_coverage{kind}", arguments.again) for kind in ("_captured", ""))
    networks: dict[str, dict[str, Any]] = {}
    for name in names:  # which is quick
        networks[name] = {"captured": captures.get({"name": name}, lambda name=name: work("captured", name))}  # type: ignore[misc]

    def save(*, quiet: bool) -> None:
        if quiet and not is_whole:
            return
        data = {"networks": [{"name": name, **found} for name, found in networks.items()]}
        title = "Classifiers in a part of plain PyTorch's memory"
        write_results("model_coverage", title, page(networks), data, quiet=quiet, write=is_whole)

    is_whole = not (arguments.quick or arguments.names)
    save(quiet=True)
    for name in names:
        layers = networks[name]["captured"].get("layers", 0)
        networks[name] |= cache.get({"name": name}, lambda name=name, layers=layers: measure(name, layers))  # type: ignore[misc]
        print(*row_of(name, networks[name])[0], sep="\t", file=sys.stderr, flush=True)
        save(quiet=name != names[-1])


if __name__ == "__main__":
    main()
