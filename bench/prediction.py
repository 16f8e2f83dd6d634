"""How well a plan knows time: predicted against measured seconds of an epoch, every method at 1/2 and 1/4 of plain training's memory.

The networks, the budgets and the runs are those of `throughput.py`. One `plan` gives the predictions of all methods, right before they
run; with several rounds both are done anew in each, and medians of the ratios count. The goal is a ratio of 0.8 to 1.2 everywhere.

    python bench/prediction.py [--only mlp,resnet18,vit,gpt] [--rounds 1] [--quick] [--again]

The plan times layers by the processor time of its thread where there is one (OMP_NUM_THREADS=1), and runs are timed by the wall's
clock: on a machine that does something else too, predictions are too low. About 20 minutes on one core; finished runs are kept in
bench/.cache/.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from common import Cache, markdown_table, plan_report, write_results
from throughput import EPOCHS, METHODS, NETWORKS, Network, fields_of, ours, plain

MB = 1e6
FRACTIONS = (2, 4)
STEPS = 3
GOAL = 0.2


def predicted(network: Network, steps: int, budget: int) -> dict[str, Any]:
    """What `plan` says of every method, by name."""
    with tempfile.TemporaryDirectory() as name:
        fields = {**fields_of(network, Path(name), steps), "epochs": EPOCHS, "max_gpu_mem": budget, "device": "cpu"}
        # The method that is asked for matters not, but that pnn cannot learn from tokens.
        report = plan_report({**fields, "method": "exact"})
    return {prospect["method"]: prospect for prospect in report["prospects"]}


def measure(
    network: Network, cache: Cache, name: str, steps: int, rounds: int, fractions: tuple[int, ...]
) -> dict[str, list[dict[str, Any]]]:
    """For each method and budget: predicted and measured seconds of each round, or the reason why it does not run."""
    found: dict[str, list[dict[str, Any]]] = {}
    key: dict[str, Any] = {"network": name, **network.__dict__, "model_arg": dict(network.model_arg), "steps": steps}
    peak = cache.get({**key, "contender": "plain"}, partial(plain, network, steps, False))["peak"]
    for number in range(rounds):
        for fraction in fractions:
            own, budget = {**key, "fraction": fraction, "round": number}, int(peak / fraction)
            plans = cache.get({**own, "contender": "plan"}, partial(predicted, network, steps, budget))
            for method in METHODS:
                plan = plans[method]
                entry = {"budget": budget, **plan}
                if plan["fits"]:
                    ran = cache.get({**own, "contender": method}, partial(ours, network, steps, method, budget))
                    entry = {**entry, "measured": ran["seconds"], "peak": ran["peak"], "retries": ran["retries"]}
                found.setdefault(f"{method} 1/{fraction}", []).append(entry)
    return found


def ratio_of(entries: list[dict[str, Any]]) -> float | None:
    """Predicted over measured seconds, the median of the rounds; None where it does not run."""
    ratios = [entry["seconds_per_epoch"] / entry["measured"] for entry in entries if "measured" in entry]
    return statistics.median(ratios) if ratios else None


def rows_of(name: str, found: Mapping[str, list[dict[str, Any]]]) -> list[tuple[str, ...]]:
    """A row per method and budget."""
    rows = []
    for contender, entries in found.items():
        first, ratio = entries[0], ratio_of(entries)
        if ratio is None:
            rows.append((name, contender, f"{first['budget'] / MB:.0f}", *["-"] * 6, first["reason"].partition("; ")[0]))
            continue
        least, most = first["micro_batches"]
        rows.append(
            (
                name,
                contender,
                f"{first['budget'] / MB:.0f}",
                str(first["partitions"]),
                str(least) if least == most else f"{least} to {most}",
                f"{first['seconds_per_epoch']:.2f}",
                f"{first['measured']:.2f}",
                f"{ratio:.2f}",
                f"{first['measured_share']:.0%}",
                "" if abs(ratio - 1) <= GOAL else "outside",
            )
        )
    return rows


def main() -> None:
    """Plan and run everything, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NETWORKS), help="comma list of networks")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the MLP at half its memory, one step an epoch; writes no page")
    parser.add_argument("--again", action="store_true", help="forget the runs that are finished")
    arguments = parser.parse_args()
    names = ["mlp"] if arguments.quick else arguments.only.split(",")
    if unknown := [name for name in names if name not in NETWORKS]:
        parser.error(f"--only {unknown[0]} is none of {', '.join(NETWORKS)}")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    cache = Cache("prediction_quick" if arguments.quick else "prediction", arguments.again)
    steps, fractions = (1, FRACTIONS[:1]) if arguments.quick else (STEPS, FRACTIONS)
    found = {name: measure(NETWORKS[name], cache, name, steps, arguments.rounds, fractions) for name in names}
    rows = [row for name, own in found.items() for row in rows_of(name, own)]
    ratios = {f"{name} {contender}": ratio_of(entries) for name, own in found.items() for contender, entries in own.items()}
    ran = {label: ratio for label, ratio in ratios.items() if ratio is not None}
    missed = [f"{label}: {ratio:.2f}" for label, ratio in ran.items() if abs(ratio - 1) > GOAL]
    heads = (
        "network", "method, budget", "budget MB", "partitions", "micro-batch", "predicted s", "measured s", "ratio", "timed", "",
    )  # fmt: skip
    page = [
        f"AdamW, float32; {steps} steps an epoch, of which the second is measured; what is done once for all epochs is spread over "
        f"{EPOCHS}; {arguments.rounds} round(s).",
        f"OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'unset')}. `timed`: share of the multiply-accumulates whose layers were run.",
        "",
        markdown_table(heads, rows),
        "",
        f"- predictions within {GOAL:.0%} of the measurement: {len(ran) - len(missed)} of {len(ran)}"
        + (f"; NOT MET by {'; '.join(missed)}" if missed else ": met"),
    ]
    if arguments.quick:
        print("\n".join(page))
        return
    write_results("prediction", "Prediction: what a plan knows of time", "\n".join(page), {"networks": found})


if __name__ == "__main__":
    main()
