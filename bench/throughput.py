"""What a budget costs in time: samples per second of every method at 1/2, 1/4 and 1/8 of the memory that plain training needs.

An MLP, a ResNet-18, a vision transformer and a GPT, each with a batch at which one would train it. First plain PyTorch with everything
in memory, which gives the memory that it needs and the speed that others are a ratio of; and the same with activation checkpointing,
which recomputes as `exact` does: blocks in about as many segments as their number's square root, the last one not checkpointed, ended
early as PyTorch does. Then every method at every budget. An epoch is timed after one that is not; methods that write boundaries once
are charged a tenth of that, since ten epochs are the default. The share of time that computing waited is the run's own figure.
What the plan predicted for an epoch stands beside it, as a ratio: `plan` times layers right before each run, by the processor time of
its thread where there is one, and the run is timed by the wall's clock.

    python bench/throughput.py [--only mlp,resnet18,vit,gpt] [--rounds 1] [--quick] [--again] [--known]

Every contender is a process of its own; plain processes have glibc's heap as it is, ours the one that they come with. With several rounds
contenders take turns, and of a network the quickest round counts, whole: all its ratios, budgets and predictions are of one time. About 40
minutes a round on one core; finished runs are kept in bench/.cache/. Networks that `--only` does not name keep their rows; `--known` measures
nothing, and makes the page of bench/results/throughput.json.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    RESULTS,
    Cache,
    StepMeter,
    arguments_of,
    distinct,
    last_json,
    lowmem_pnn,
    markdown_table,
    plan_report,
    run_process,
    write_results,
)
from neuroflux_runs import times_of
from workloads import Network, chosen, fields_of

MB = 1e6
FRACTIONS = (2, 4, 8)
METHODS = ("exact", "backprop", "pnn", "neuroflux")
# What the planner prefers is an option: a default that is the same on every machine; or predicted seconds.
CONTENDERS = {"exact": ("exact", "auto"), "exact, by time": ("exact", "time"), **{name: (name, "auto") for name in METHODS[1:]}}
LOCAL = ("pnn", "neuroflux")
# Epochs that the default writes boundaries once for.
EPOCHS = 10
STEPS = 3
# A contender that needs more than this share of plain's memory saves next to nothing.
SAVES = 0.9
LOCAL_GOAL, EXACT_GOAL, STALL_GOAL, PREDICTION_GOAL = 1.0, 0.95, 0.05, 0.2


NETWORKS = {
    "mlp": Network("mlp:" + "-".join(["1024"] * 25) + "-10", "grey", 1024),
    "resnet18": Network("cifar-resnet18", "images", 64),
    "vit": Network("networks:vit", "images", 64, {"depth": 8, "width": 384, "heads": 6}),
    "gpt": Network("gpt:layers=8,width=512,heads=8,context=256", "text", 16),
}


def in_memory(file: Path) -> None:
    """Plain PyTorch, of the settings in a file; prints JSON as the last line."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from lowmem_pnn.capture.capture import capture
    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.device.cpu import warm_up
    from lowmem_pnn.engine.passes import forward
    from lowmem_pnn.model.chain import TensorSpec
    from lowmem_pnn.model.layer import Layer
    from lowmem_pnn.workload import open_data

    settings = json.loads(file.read_text())
    checkpoints = settings.pop("checkpoints")
    config = configure(max_gpu_mem="1TB", method="backprop", **settings)
    inputs = open_data(config)
    source, dataset, splits = inputs.source, inputs.dataset, inputs.splits
    train = splits["train"]
    warm_up(torch.device("cpu"))
    meter = StepMeter()
    meter.begin()
    torch.manual_seed(config.seed)
    model = source.build().train()
    chain = capture(model, TensorSpec(dataset.sample_shape, dataset.dtype))
    size = math.ceil(math.sqrt(len(chain.layers)))
    segments = [chain.layers[begin : begin + size] for begin in range(0, len(chain.layers), size)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    def run(layers: tuple[Layer, ...], *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return forward(layers, tensors)

    (batch,) = config.batch_sizes
    meter.lap()
    for _ in range(2):
        for begin in range(0, len(train), batch):
            samples, labels = train.batch(np.arange(begin, min(begin + batch, len(train))))
            tensors: tuple[torch.Tensor, ...] = (samples,)
            for number, layers in enumerate(segments):
                if checkpoints and number < len(segments) - 1:
                    tensors = checkpoint(partial(run, layers), *tensors, use_reentrant=False)
                else:
                    tensors = run(layers, *tensors)
            loss = torch.nn.functional.cross_entropy(tensors[0].flatten(0, -2), labels.flatten())
            del tensors
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
            meter.lap()
    seconds = meter.step_seconds()
    print(json.dumps({"seconds": sum(seconds[len(seconds) // 2 :]), "peak": meter.figures(skip=0)["private_above_imports"]}))


def plain(network: Network, steps: int, checkpoints: bool) -> dict[str, Any]:
    """Seconds of an epoch and the peak, with everything in memory."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "settings.json"
        file.write_text(json.dumps({**fields_of(network, Path(name), steps, epochs=2), "checkpoints": checkpoints}))
        found: dict[str, Any] = last_json(run_process([sys.executable, __file__, "--in-memory", str(file)]).stdout)
    return found


def ours(network: Network, steps: int, method: str, budget: int, plan_for: str) -> dict[str, Any]:
    """Seconds of an epoch, what it waited for, and the peak; `reason` alone where it does not fit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fields = {
            **fields_of(network, folder, steps, epochs=2),
            "method": method,
            "max_gpu_mem": budget,
            "device": "cpu",
            "plan_for": plan_for,
        }
        report = plan_report({**fields, "epochs": EPOCHS})
        if not report["fits"]:
            return {"reason": report["reason"]}
        (prospect,) = (one for one in report["prospects"] if one["asked"])
        workdir = folder / "run"
        settings = {**fields, "commit_every": 1_000_000, "log_every": 1_000_000, "workdir": workdir}
        done = run_process(lowmem_pnn("fit", "--json", "--quiet", *arguments_of(settings)))
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    result = json.loads(done.stdout)
    samples = network.batch * steps
    times = times_of(lines, samples, result["seconds"])
    last = {line["partition"]: line for line in lines if "samples_per_second" in line}
    waited: dict[str, float] = {}
    for line in last.values():
        for kind, share in line["waiting"].items():
            waited[kind] = waited.get(kind, 0.0) + share * samples / line["samples_per_second"]
    return {
        "seconds": times["learning"] + times["caching"] / EPOCHS,
        "predicted_seconds": prospect["seconds_per_epoch"],
        "timed_share": prospect["measured_share"],
        "waited": {kind: seconds / times["learning"] for kind, seconds in waited.items()},
        "peak": result["peak_bytes"],
        "partitions": len(result["partitions"]),
        "micro_batches": [part["micro_batch"] for part in result["partitions"]],
        "retries": result["oom_retries"],
    }


def quickest_of(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The round whose contenders took the least together: others on the machine only add.

    Args:
        rounds: of each the figures by contender.
    """
    timed = [name for name in rounds[0] if all("seconds" in found[name] for found in rounds)]
    return min(rounds, key=lambda found: sum(found[name]["seconds"] for name in timed))


def measure(network: Network, cache: Cache, name: str, steps: int, rounds: int, fractions: tuple[int, ...]) -> dict[str, Any]:
    """All contenders of a network."""
    measured: list[dict[str, dict[str, Any]]] = []
    for number in range(rounds):
        runs: dict[str, dict[str, Any]] = {}
        key = {"network": name, **network.__dict__, "model_arg": dict(network.model_arg), "steps": steps, "round": number}
        for checkpoints in (False, True):
            contender = "checkpointed" if checkpoints else "plain"
            runs[contender] = cache.get({**key, "contender": contender}, partial(plain, network, steps, checkpoints))
        for fraction in fractions:
            budget = int(runs["plain"]["peak"] / fraction)
            for contender, (method, plan_for) in CONTENDERS.items():
                if method == "pnn" and network.data == "text":  # it has a code for each class of samples, not of tokens
                    continue
                # By the fraction, since the budget is measured.
                runs[f"{contender} 1/{fraction}"] = cache.get(
                    {**key, "contender": contender, "fraction": fraction}, partial(ours, network, steps, method, budget, plan_for)
                )
        measured.append(runs)
    return quickest_of(measured)


def rows_of(name: str, network: Network, found: Mapping[str, dict[str, Any]], steps: int) -> list[tuple[str, ...]]:
    """A row per contender."""
    base, checkpointed = found["plain"], found["checkpointed"]
    rows = []
    for contender, own in found.items():
        if "reason" in own:
            needs = own["reason"].partition("; give")[0]
            rows.append((name, contender, *(["-"] * 8), needs))
            continue
        waited = own.get("waited", {})
        parts = own.get("micro_batches", [])
        sizes = sorted({*parts})
        rows.append(
            (
                name,
                contender,
                f"{network.batch * steps / own['seconds']:.1f}",
                f"{base['seconds'] / own['seconds']:.2f}",
                f"{checkpointed['seconds'] / own['seconds']:.2f}",
                f"{own['peak'] / MB:.0f}",
                str(len(parts)) if parts else "-",
                (f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}") if sizes else "-",
                f"{own['predicted_seconds'] / own['seconds']:.2f}" if "predicted_seconds" in own else "-",
                f"{sum(waited.values()):.1%}" if waited else "-",
                ", ".join(f"{kind} {share:.1%}" for kind, share in waited.items() if share >= 0.001),
            )
        )
    return rows


def verdicts(found: Mapping[str, Mapping[str, dict[str, Any]]]) -> list[str]:
    """The goals, each with the contenders that miss it."""
    missed: dict[str, list[str]] = {"local": [], "exact": [], "stalls": [], "prediction": []}
    for name, contenders in found.items():
        for contender, own in contenders.items():
            if contender in ("plain", "checkpointed") or "reason" in own:
                continue
            method = contender.split()[0].rstrip(",")
            label = f"{name} {contender}"
            if method in LOCAL and (ratio := contenders["plain"]["seconds"] / own["seconds"]) < LOCAL_GOAL:
                missed["local"].append(f"{label}: {ratio:.2f}")
            if method == "exact" and (ratio := contenders["checkpointed"]["seconds"] / own["seconds"]) < EXACT_GOAL:
                missed["exact"].append(f"{label}: {ratio:.2f}")
            if (share := sum(own["waited"].values())) > STALL_GOAL:
                missed["stalls"].append(f"{label}: {share:.1%}")
            if abs((ratio := own["predicted_seconds"] / own["seconds"]) - 1) > PREDICTION_GOAL:
                missed["prediction"].append(f"{label}: {ratio:.2f}")
    goals = {
        "local": f"local methods at least {LOCAL_GOAL:.1f} of plain training",
        "exact": f"exact at least {EXACT_GOAL:.2f} of checkpointed training",
        "stalls": f"computing waits for at most {STALL_GOAL:.0%} of the time",
        "prediction": f"predicted within {PREDICTION_GOAL:.0%} of the measurement",
    }
    return [
        f"- {words}: {'met' if not missed[goal] else 'NOT MET by ' + '; '.join(missed[goal])}" for goal, words in goals.items()
    ]


def savings(found: Mapping[str, Mapping[str, dict[str, Any]]]) -> list[str]:
    """What checkpointing saves, which `exact` is held against: a rival that saves nothing is none, and plain training is the measure."""
    lines = []
    for name, contenders in found.items():
        plain, own = contenders["plain"], contenders["checkpointed"]
        line = f"- {name}: checkpointing takes {own['peak'] / MB:.0f} of plain's {plain['peak'] / MB:.0f} MB"
        if own["peak"] > SAVES * plain["peak"]:
            ratios = [
                plain["seconds"] / one["seconds"]
                for which, one in contenders.items()
                if which.startswith("exact") and "seconds" in one
            ]
            line += ", which saves next to nothing"
            line += (
                f": `exact` is to be held against plain, of which it is {min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
            )
        lines.append(line)
    return lines


def wander(found: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    """How much slower one run was than another of the same plan: what ratios are to be read with."""
    ratios = {}
    for name, contenders in found.items():
        for contender, own in contenders.items():
            other = contenders.get(contender.replace("exact ", "exact, by time "), own)
            if other is not own and "seconds" in own and own["micro_batches"] == other.get("micro_batches"):
                times = own["seconds"], other["seconds"]
                ratios[f"{name} {contender}"] = max(times) / min(times)
    if not ratios:
        return "- no plan ran twice: nothing says how much the machine's speed wanders"
    listed = ", ".join(f"{label} {ratio:.2f}" for label, ratio in ratios.items())
    return f"- the machine's speed wanders: `exact` took the same plan both ways, and one run took so many times as long as the other: {listed}"


def main() -> None:
    """Run all contenders and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma list of networks; rows of others are kept")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the MLP at half its memory, one step an epoch; writes no page")
    parser.add_argument("--again", action="store_true", help="forget the runs that are finished")
    parser.add_argument("--known", action="store_true", help="measure nothing: the page of what throughput.json holds")
    parser.add_argument("--in-memory", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_memory is not None:
        in_memory(arguments.in_memory)
        return
    names = ["mlp"] if arguments.quick else chosen(parser, arguments.only, NETWORKS)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    cache = Cache("throughput_quick" if arguments.quick else "throughput", arguments.again)
    steps, fractions = (1, FRACTIONS[:1]) if arguments.quick else (STEPS, FRACTIONS)
    file = RESULTS / "throughput.json"
    kept = json.loads(file.read_text()) if (arguments.known or arguments.only) and not arguments.quick and file.exists() else {}
    names = [] if arguments.known else names
    found, machines, rounds = ({**kept.get(key, {})} for key in ("networks", "machine_of", "rounds_of"))
    for name in names:
        network = NETWORKS[name]
        cache.machines = []
        found[name] = measure(network, cache, name, steps, arguments.rounds, fractions)
        machines[name], rounds[name] = cache.machines, arguments.rounds
    earlier = {name: cells for name, cells in kept.get("earlier", {}).items() if name not in found}
    rows = [row for name in found for row in rows_of(name, NETWORKS[name], found[name], steps)]
    heads = (
        "network", "contender, budget", "samples/s", "of plain", "of checkpointed", "peak MB", "partitions", "micro-batch", "predicted/measured",
        "waiting", "for",
    )  # fmt: skip
    batches = ", ".join(f"{name} {NETWORKS[name].batch}" for name in [*found, *earlier])
    counted = ", ".join(f"{name} {count}" for name, count in rounds.items())
    page = [
        f"AdamW, float32, batches of {batches} samples; {steps} steps an epoch, the second epoch counts; of rounds ({counted}) the quickest.",
        "Budgets are fractions of plain training's peak; all peaks are private memory above what the process holds after imports.",
        "Ours run in a tidied heap, plain PyTorch in glibc's own.",
        "",
        markdown_table(heads, rows),
        "",
        *verdicts(found),
        *savings(found),
        wander(found),
    ]
    if earlier:
        page += ["", "## At an earlier state", "", kept["earlier_words"], ""]
        page.append(markdown_table(heads, [row for cells in earlier.values() for row in cells]))
        page.append("")
        page += [f"- {line}" for name, line in kept["earlier_savings"].items() if name in earlier]
    if arguments.quick:
        print("\n".join(page))
        return
    data = {"networks": found, "machine_of": machines, "rounds_of": rounds}
    if earlier:
        data |= {"earlier": earlier, **{key: kept[key] for key in ("earlier_words", "earlier_savings")}}
    of_figures = distinct([one for name in found for one in machines[name]])
    write_results("throughput", "Throughput: what a budget costs in time", "\n".join(page), data, machines=of_figures)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
