"""How many tokens must a batch have until streaming a model from disk costs nothing?

A language model of 85 million parameters whose training state is several times the budget: ours (`--method exact`) beside the same
model in memory with activation checkpointing, as PyTorch does it: blocks are checkpointed but for those that ours has in its
last partition, whose activations it need not compute again. Same weights, batches and micro-batches, AdamW. Tokens per second against
tokens per batch: the more of them, the more computing hides each weight's way from disk and back.

PyTorch's checkpoint ends its recompute at the last tensor that backward needs, which spares it the last matrix product of each block, a
third of the block's. Without that (`set_checkpoint_early_stop(False)`) it computes what ours does: that is a column of its own.

Processes take turns (ours, theirs, ours, theirs), so that a busy machine slows both; the ratio is of medians of seconds per step.

    python bench/streaming.py [--tokens 512,1024,...] [--budget 300MB] [--rounds 2] [--text FILE] [--quick] [--again] [--known]

Sizes that were measured are kept in bench/.cache/, so that an interrupted bench goes on; `--again` forgets them. `--known` measures
nothing, and makes the page of the figures in bench/results/streaming.json.
The text is $LOWMEM_PNN_DATA/tinyshakespeare.txt where there is one, else random bytes. Files go where TMPDIR says.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import RESULTS, Cache, StepMeter, fit, last_json, markdown_table, place_text, run_process, step_means, write_results

CONTEXT = 512
MODEL = f"gpt:layers=12,width=768,heads=12,context={CONTEXT}"
# One sample: what goes through the device at once, however large the batch.
MICRO_BATCH = 1
TOKENS = "512,1024,2048,4096,8192,16384"
# Steps that are timed, after one that is not; more where they are short.
TIMED = {512: 10, 1024: 8, 2048: 6, 4096: 4}
TIMED_AT_LEAST = 1
LR = 1e-4
SEED = 0
MB = 1e6

# By the tokens of a batch from which on it is to be had: speed, of the speed in memory.
GOALS = {512: 0.95, 2048: 1.2}


def settings(tokens: int, text: Path) -> dict[str, Any]:
    """What both train on: fields of `FitConfig`."""
    batch = tokens // CONTEXT
    return {
        "model": MODEL,
        "data": f"text:{text}",
        "batch_size": batch,
        "micro_batch": MICRO_BATCH,
        "epochs": 1,
        "lr": LR,
        "seed": SEED,
        "val_fraction": 0.0,
        "train_limit": batch * (TIMED.get(tokens, TIMED_AT_LEAST) + 1),
        "test_limit": 1,
    }


def ours(tokens: int, text: Path, budget: str) -> dict[str, Any]:
    """One run of the command."""
    options = [part for name, value in settings(tokens, text).items() for part in (f"--{name.replace('_', '-')}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        result, lines, _ = fit(Path(folder) / "run", "--method", "exact", "--max-gpu-mem", budget, *options)
    last = {layer.split(".")[1] for layer in result["partitions"][-1]["layers"] if layer.startswith("blocks.")}
    return {
        "losses": [line["loss"] for line in lines],
        "step_seconds": [after["seconds"] - before["seconds"] for before, after in pairwise(lines)],
        **step_means(lines, 1),
        "peak": result["peak_bytes"],
        "training_state": result["training_state_bytes"],
        "partitions": len(result["partitions"]),
        "last_blocks": len(last),
    }


def in_memory(tokens: int, text: Path, kept_blocks: int, early_stop: bool) -> None:
    """The same work with everything in memory; prints JSON as the last line.

    Args:
        tokens: of a batch.
        text: the file.
        kept_blocks: at the end, which are not checkpointed.
        early_stop: a block's recompute ends with the last tensor that backward needs.
    """
    import torch
    from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.seeds import permutation_of
    from lowmem_pnn.workload import open_data

    config = configure(max_gpu_mem="1TB", method="exact", **settings(tokens, text))
    inputs = open_data(config)
    source, splits = inputs.source, inputs.splits
    train = splits["train"]
    meter = StepMeter()
    meter.begin()
    torch.manual_seed(SEED)
    model: Any = source.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    losses = []
    meter.lap()
    with set_checkpoint_early_stop(early_stop):
        for chosen in permutation_of(len(train), SEED, "epoch", 0).reshape(-1, tokens // CONTEXT):
            samples, labels = train.batch(chosen)
            total = 0.0
            for begin in range(0, len(chosen), MICRO_BATCH):
                part = slice(begin, begin + MICRO_BATCH)
                x = model.embedding(samples[part])
                for number, block in enumerate(model.blocks):
                    x = block(x) if number >= len(model.blocks) - kept_blocks else checkpoint(block, x, use_reentrant=False)
                scores = model.head(model.norm(x))
                loss = torch.nn.functional.cross_entropy(scores.flatten(0, -2), labels[part].flatten()) * (
                    MICRO_BATCH / len(chosen)
                )
                torch.autograd.backward(loss)
                total += loss.item()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            meter.lap()
    print(json.dumps({"losses": losses, "step_seconds": meter.step_seconds()[1:], **meter.figures(skip=1)}))


def take_turns(tokens: int, text: Path, budget: str, rounds: int) -> dict[str, Any]:
    """Ours, the same in memory, and that with PyTorch's early stop, round after round."""
    found: dict[str, Any] = {"ours": [], "in_memory": [], "early_stop": []}
    for _ in range(rounds):
        found["ours"].append(ours(tokens, text, budget))
        command = [sys.executable, __file__, "--tokens", str(tokens), "--text", str(text)]
        command += ["--in-memory", str(found["ours"][-1]["last_blocks"])]
        found["in_memory"].append(last_json(run_process(command).stdout))
        found["early_stop"].append(last_json(run_process([*command, "--early-stop"]).stdout))
    return found


def draw(points: list[dict[str, Any]], path: Path) -> bool:
    """Ratio against tokens per batch, where there is matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # type: ignore[import-not-found, unused-ignore]

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogx([point["tokens"] for point in points], [point["ratio"] for point in points], "o-", base=2)
    axes.axhline(1.0, color="grey", linewidth=0.8)
    for least_tokens, goal in GOALS.items():
        axes.plot([least_tokens, points[-1]["tokens"]], [goal, goal], color="grey", linewidth=0.8, linestyle="--")
    axes.set_ylim(0, max(1.3, 1.05 * max(point["ratio"] for point in points)))
    axes.set_xlabel("tokens per batch")
    axes.set_ylabel("tokens per second, streamed / in memory")
    figure.savefig(path, dpi=150)
    return True


def verdict(points: list[dict[str, Any]], least_tokens: int, goal: float) -> str:
    """Whether a goal is met at all sizes for which it stands."""
    ratios = {point["tokens"]: point["ratio"] for point in points if point["tokens"] >= least_tokens}
    below = ", ".join(f"{ratio:.3f} at {tokens}" for tokens, ratio in ratios.items() if ratio < goal)
    found = "not measured" if not ratios else f"NOT MET: {below}" if below else f"{min(ratios.values()):.3f} at least, met"
    return f"- at least {goal} of the speed in memory from {least_tokens} tokens on: {found}"


def main() -> None:
    """Run all sizes and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default=TOKENS, help=f"tokens per batch, multiples of {CONTEXT}")
    parser.add_argument("--budget", default="300MB")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--quick", action="store_true", help="two sizes, one round; writes no page")
    parser.add_argument("--again", action="store_true", help="forget the sizes that were measured before")
    parser.add_argument("--known", action="store_true", help="measure nothing: the page of what streaming.json holds")
    parser.add_argument("--in-memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--early-stop", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_memory is not None:
        in_memory(int(arguments.tokens), arguments.text, arguments.in_memory, arguments.early_stop)
        return
    if arguments.quick:
        arguments.tokens, arguments.rounds = f"{CONTEXT},{8 * CONTEXT}", 1
    sizes = [int(tokens) for tokens in arguments.tokens.split(",")]
    if wrong := [tokens for tokens in sizes if tokens <= 0 or tokens % CONTEXT]:
        parser.error(f"--tokens {wrong[0]} is no multiple of the context; give multiples of {CONTEXT}")
    known: dict[str, Any] = {}
    if arguments.known:
        known = json.loads((RESULTS / "streaming.json").read_text())
        sizes = [point["tokens"] for point in known["points"]]
    load_before = known.get("load_before", os.getloadavg()[0])
    rounds = len(known["points"][0]["ours"]) if known else arguments.rounds
    cache = Cache("streaming_quick" if arguments.quick else "streaming", arguments.again)
    points, rows = [], []
    with tempfile.TemporaryDirectory() as name:
        copy, words = place_text(arguments.text, Path(name), SEED)
        for tokens in sizes:
            if known:
                found = next(point for point in known["points"] if point["tokens"] == tokens)
            else:
                key = {"tokens": tokens, "budget": arguments.budget, "rounds": rounds, "text": words}
                found = cache.get(key, partial(take_turns, tokens, copy, arguments.budget, rounds))
            mine, theirs, whole = found["ours"], found["early_stop"], found["in_memory"]
            medians = [
                statistics.median(seconds for run in runs for seconds in run["step_seconds"]) for runs in (mine, theirs, whole)
            ]
            ratio = medians[1] / medians[0]
            own, reference = mine[0], theirs[0]
            far = max(abs(a - b) for a, b in zip(own["losses"], reference["losses"], strict=True))
            points.append({**found, "tokens": tokens, "ratio": ratio, "seconds": medians})
            rows.append(
                (
                    str(tokens),
                    f"{medians[0]:.2f}",
                    f"{medians[1]:.2f}",
                    f"{tokens / medians[0]:.0f}",
                    f"{tokens / medians[1]:.0f}",
                    f"{ratio:.3f}",
                    f"{medians[2] / medians[0]:.3f}",
                    f"{statistics.fmean(run['cpu_seconds'] for run in mine):.2f}",
                    f"{statistics.fmean(run['cpu_seconds'] for run in theirs):.2f}",
                    f"{own['read'] / MB:.0f}",
                    f"{own['written'] / MB:.0f}",
                    f"{max(run['peak'] for run in mine) / MB:.0f}",
                    f"{max(run['private_above_imports'] for run in theirs) / MB:.0f}",
                    f"{far:.1e}",
                )
            )
            print(*rows[-1], sep="\t", file=sys.stderr, flush=True)
    heads = (
        "tokens per batch", "ours s/step", "in memory s/step", "ours tokens/s", "in memory tokens/s", "ratio", "ratio, no early stop",
        "our CPU s/step", "in memory CPU s/step", "read MB/step", "written MB/step", "our peak MB", "in memory peak MB", "losses differ by",
    )  # fmt: skip
    first = points[0]["ours"][0]
    threads = known.get("machine", {}).get("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "unset"))
    page = [
        f"{MODEL}, AdamW, {words}; training state {first['training_state'] / MB:.0f} MB, budget {arguments.budget}, "
        f"{first['partitions']} partitions, micro-batches of {MICRO_BATCH * CONTEXT} tokens for both.",
        f"In memory all blocks but the last {first['last_blocks']} are checkpointed. {rounds} round(s); medians of seconds per "
        f"step, the first step of a process not counted. Load before: {load_before:.1f}; OMP_NUM_THREADS {threads}.",
        "",
        markdown_table(heads, rows),
        "",
        *(verdict(points, tokens, goal) for tokens, goal in GOALS.items()),
    ]
    if arguments.quick:
        print("\n".join(page))
        return
    if draw(points, RESULTS / "streaming.png"):
        page += ["", "![ratio against tokens per batch](streaming.png)"]
    title, data = "Streaming: the cost against the tokens of a batch", {"load_before": load_before, "points": points}
    write_results("streaming", title, "\n".join(page), data, machines=[known["machine"]] if known else cache.machines)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
