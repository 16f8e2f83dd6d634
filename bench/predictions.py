"""How near is the predicted peak to the measured one, at the smallest budget that `plan` names?

For each network: `plan` in 6 MB names a budget, `fit` trains one epoch of three batches there (`exact`, AdamW, batch 16, random images
of 64x64 or the smallest that the network takes, 10 classes), each in a process of its own; nine tenths of that budget have to be refused.

    python bench/predictions.py [--quick] [--names mlp:1024-1024-1024-10,resnet18,timm:resnet10t] [--again]

Names beginning with `timm:` need timm, which is no dependency. Results are kept, and a network is not measured again without --again.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from classifiers import CLASSES, TIMM, TORCHVISION, builder_of, shape_of, side_of
from common import Cache, markdown_table, run_process, write_results

BATCH, BATCHES = 16, 3
# Goal for predicted / measured.
LEAST, MOST = 0.9, 1.15
MB = 1e6
QUICK = ("mlp:256-256-256-10", "mlp:1024-1024-1024-1024-10")
NETWORKS = (*QUICK, "mlp:4096-4096-4096-4096-10", *TORCHVISION, *TIMM)


def work(name: str, budget: str | None) -> None:
    """Plan (without a budget) or train in this process, and print what came out."""
    import torch

    import lowmem_pnn
    from lowmem_pnn.errors import BudgetError

    x = torch.rand(BATCHES * BATCH, *shape_of(name), generator=torch.Generator().manual_seed(0))
    data = x, torch.arange(BATCHES * BATCH) % CLASSES
    options: dict[str, Any] = {"method": "exact", "batch_size": BATCH, "val_fraction": 0.0, "device": "cpu"}
    if budget is None:
        report = lowmem_pnn.plan(builder_of(name), data, max_gpu_mem="6MB", timing=False, **options)
        named = re.search(r"--max-gpu-mem (\d+)MB", report.reason)
        print(json.dumps({"named": int(named[1]) if named else 6}))
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = lowmem_pnn.fit(builder_of(name), data, max_gpu_mem=budget, epochs=1, workdir=f"{folder}/run", **options)
        except BudgetError:
            print(json.dumps({"refused": True}))
            return
    print(json.dumps({"predicted": result.predicted_peak_bytes, "measured": result.peak_bytes, "shrinks": result.oom_retries}))


def measure(name: str) -> dict[str, Any]:
    """Measure a network in processes of its own."""

    def ours(*arguments: str) -> dict[str, Any]:
        done = run_process([sys.executable, __file__, "--work", name, *arguments])
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    named = ours()["named"]
    tenth_less = ours("--budget", f"{named * 9 // 10}MB")
    return {"named": named, **ours("--budget", f"{named}MB"), "tenth_less_refused": tenth_less.get("refused", False)}


def row_of(found: dict[str, Any]) -> tuple[str, ...]:
    """Return a network's line of the table; without figures where its named budget was refused."""
    side = "" if found["name"].startswith("mlp:") else str(side_of(found["name"]))
    less = "yes" if found["tenth_less_refused"] else "no"
    if found["ratio"] is None:
        return found["name"], side, str(found["named"]), "refused", "", "", "", less
    sizes = [f"{found[key] / MB:.1f}" for key in ("predicted", "measured")]
    return found["name"], side, str(found["named"]), *sizes, f"{found['ratio']:.2f}", str(found["shrinks"]), less


def write_page(networks: list[dict[str, Any]], *, write: bool) -> None:
    """Write the page of the networks that have been measured so far, or print it alone."""
    heads = ("network", "side", "named MB", "predicted MB", "measured MB", "ratio", "batches done again", "a tenth less refused")
    trained = [found for found in networks if found["ratio"] is not None]
    inside = [found for found in trained if LEAST <= found["ratio"] <= MOST]
    text = "\n".join(
        [
            f"`exact`, AdamW, batch {BATCH}, one epoch of {BATCHES} batches, CPU, in the smallest budget that `plan` names. Predicted peaks are",
            "without the reserve and without what may wait to be written; measured ones are the highest private memory above the floor.",
            "",
            markdown_table(heads, [row_of(found) for found in networks]),
            "",
            f"- the named budget trains: {len(trained)} of {len(networks)}",
            f"- a tenth less is refused: {sum(found['tenth_less_refused'] for found in networks)} of {len(networks)}",
            f"- predicted / measured within {LEAST} to {MOST}: {len(inside)} of {len(trained)}",
            f"- peaks above the budget: {sum(found['measured'] > found['named'] * MB for found in trained)}",
        ]
    )
    write_results("predictions", "Predicted peaks against measured ones", text, {"networks": networks}, write=write)


def main() -> None:
    """Measure the networks and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small networks, about a minute; writes no page")
    parser.add_argument("--names", help="comma list of networks; writes no page")
    parser.add_argument("--again", action="store_true", help="forget the networks that were measured before")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--budget", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work, arguments.budget)
        return
    is_whole = not (arguments.quick or arguments.names)
    names = arguments.names.split(",") if arguments.names else QUICK if arguments.quick else NETWORKS
    cache = Cache("predictions", arguments.again)
    networks: list[dict[str, Any]] = []
    for name in names:
        try:
            found = cache.get({"name": name}, lambda name=name: measure(name))  # type: ignore[misc]
        except (RuntimeError, subprocess.SubprocessError) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            continue
        networks.append(
            {"name": name, **found, "ratio": None if found.get("refused") else found["predicted"] / found["measured"]}
        )
        print(*row_of(networks[-1]), sep="\t", file=sys.stderr, flush=True)
        if is_whole:
            write_page(networks, write=True)
    if networks and not is_whole:
        write_page(networks, write=False)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
