"""Does a language model many times larger than the budget learn what it learns in memory?

A GPT whose training state (weights, gradients and moments: 16 bytes a parameter) is at least eight times the budget trains on the
works of Shakespeare, byte by byte: ours (`--method exact`) inside its budget, with the wall up, and plain PyTorch with everything in
memory, on the same initial weights, batches and micro-batches. Losses step by step, peaks, and the test loss and perplexity of both.

    python bench/shakespeare.py [--budget 96MB] [--steps 30] [--text FILE] [--quick]

The text is $LOWMEM_PNN_DATA/tinyshakespeare.txt where there is one, else random bytes. Files go where TMPDIR says.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import StepMeter, fit, last_json, markdown_table, place_text, run_process, write_results

CONTEXT = 128
MODEL = f"gpt:layers=16,width=512,heads=8,context={CONTEXT}"
QUICK_MODEL, QUICK_BUDGET, QUICK_STEPS = f"gpt:layers=16,width=192,heads=4,context={CONTEXT}", "60MB", 4
BATCH = 8
# The most samples at once; the plan may take fewer, and then plain PyTorch does too.
MICRO_BATCH = 4
TEST_SAMPLES = 64
LR = 1e-3
SEED = 0
MB = 1e6

GOAL_SMALLER = 8
# Of the test losses' difference: the batches of a measurement may be others than here, and so the order of sums.
TEST_TOLERANCE = 1e-5


def settings(model: str, steps: int, text: Path) -> dict[str, Any]:
    """What both train on: fields of `FitConfig`."""
    return {
        "model": model,
        "data": f"text:{text}",
        "batch_size": BATCH,
        "micro_batch": MICRO_BATCH,
        # All of a micro-batch's tokens: in chunks, chosen where memory is short, the loss is the same but for the order of its sum.
        "loss_chunk": MICRO_BATCH * CONTEXT,
        "epochs": 1,
        "lr": LR,
        "lr_schedule": "cosine",
        "warmup_steps": max(steps // 10, 1),
        "seed": SEED,
        "val_fraction": 0.0,
        "train_limit": BATCH * steps,
        "test_limit": TEST_SAMPLES,
    }


def in_memory(name: str, steps: int, text: Path, micro_batch: int) -> None:
    """Plain PyTorch; prints JSON as the last line."""
    import torch

    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.optim.lr_schedules import lr_factor
    from lowmem_pnn.seeds import permutation_of
    from lowmem_pnn.workload import open_data

    config = configure(max_gpu_mem="1TB", method="exact", **settings(name, steps, text))
    inputs = open_data(config)
    source, splits = inputs.source, inputs.splits
    train, test = splits["train"], splits["test"]
    meter = StepMeter()
    meter.begin()
    torch.manual_seed(SEED)
    model: Any = source.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def loss_of(samples: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(samples).flatten(0, -2), labels.flatten())

    losses = []
    meter.lap()
    for step, chosen in enumerate(permutation_of(len(train), SEED, "epoch", 0).reshape(steps, BATCH)):
        samples, labels = train.batch(chosen)
        total = 0.0
        for begin in range(0, BATCH, micro_batch):
            part = slice(begin, begin + micro_batch)
            loss = loss_of(samples[part], labels[part]) * (len(chosen[part]) / BATCH)
            torch.autograd.backward(loss)
            total += loss.item()
        optimizer.param_groups[0]["lr"] = LR * lr_factor(config.lr_schedule, step, steps, config.warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        meter.lap()
    model.eval()
    with torch.no_grad():
        sums = [float(loss_of(*test.batch(np.arange(n, n + 1)))) for n in range(len(test))]
    test_loss = math.fsum(sums) / len(sums)
    print(json.dumps({"losses": losses, "test_loss": test_loss, "perplexity": math.exp(test_loss), **meter.figures(skip=1)}))


def main() -> None:
    """Run both and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="96MB")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--text", type=Path)
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} steps of a small model, a minute of processor time; writes no page"
    )
    parser.add_argument("--in-memory", type=int, metavar="MICRO_BATCH", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = QUICK_MODEL if arguments.quick else MODEL
    if arguments.quick:
        arguments.steps, arguments.budget = QUICK_STEPS, QUICK_BUDGET
    if arguments.in_memory is not None:
        in_memory(model, arguments.steps, arguments.text, arguments.in_memory)
        return
    with tempfile.TemporaryDirectory() as name:
        copy, words = place_text(arguments.text, Path(name), SEED)
        given = settings(model, arguments.steps, copy).items()
        options = [part for name_, value in given for part in (f"--{name_.replace('_', '-')}", str(value))]
        own, lines, process = fit(Path(name) / "run", "--method", "exact", "--max-gpu-mem", arguments.budget, *options)
        micro_batch = own["partitions"][0]["micro_batch"]
        command = [
            sys.executable,
            __file__,
            "--in-memory",
            str(micro_batch),
            "--steps",
            str(arguments.steps),
            "--text",
            str(copy),
            *(["--quick"] if arguments.quick else []),
        ]
        done = run_process(command)
    reference = last_json(done.stdout)
    losses = [line["loss"] for line in lines]
    differences = [abs(a - b) for a, b in zip(losses, reference["losses"], strict=True)]
    smaller = own["training_state_bytes"] / own["budget_bytes"]
    test_difference = abs(own["test_loss"] - reference["test_loss"])
    own_seconds = (lines[-1]["seconds"] - lines[0]["seconds"]) / (len(lines) - 1)
    heads = ("", "ours", "plain PyTorch in memory", "ratio")
    rows = [
        (
            "peak above the floor, MB",
            f"{own['peak_bytes'] / MB:.1f}",
            f"{reference['private_above_imports'] / MB:.0f}",
            f"{own['peak_bytes'] / reference['private_above_imports']:.3f}",
        ),
        ("peak RSS, MB", f"{process.peak_rss_bytes / MB:.0f}", f"{done.peak_rss_bytes / MB:.0f}", "-"),
        ("s per step", f"{own_seconds:.2f}", f"{reference['seconds']:.2f}", f"{own_seconds / reference['seconds']:.2f}"),
        ("test loss", f"{own['test_loss']:.6f}", f"{reference['test_loss']:.6f}", f"{test_difference:.1e} apart"),
        ("perplexity", f"{own['perplexity']:.4f}", f"{reference['perplexity']:.4f}", "-"),
        ("partitions", str(len(own["partitions"])), "1", "-"),
        ("MB read and written", f"{own['bytes_read'] / MB:.0f} + {own['bytes_written'] / MB:.0f}", "-", "-"),
    ]
    shown = sorted({*range(0, arguments.steps, max(arguments.steps // 10, 1)), arguments.steps - 1})
    steps = [
        (str(step + 1), f"{losses[step]:.6f}", f"{reference['losses'][step]:.6f}", f"{differences[step]:.1e}") for step in shown
    ]

    def verdict(goal: str, found: str, met: bool) -> str:
        return f"- {goal}: {found}, {'met' if met else 'NOT MET'}"

    page = [
        f"{model} on {words}, AdamW, cosine, batch {BATCH} x {CONTEXT} tokens in micro-batches of {micro_batch}, {arguments.steps} steps; "
        f"{own['training_state_bytes'] / MB:.0f} MB of training state, budget {arguments.budget}; test on {TEST_SAMPLES} windows.",
        "",
        markdown_table(heads, rows),
        "",
        markdown_table(("step", "our loss", "plain loss", "difference"), steps),
        "",
        # The small model's kernels and reserve take a share of the budget that leaves no room for this goal.
        *(
            []
            if arguments.quick
            else [verdict(f"training state at least {GOAL_SMALLER} times the budget", f"{smaller:.1f}", smaller >= GOAL_SMALLER)]
        ),
        verdict(
            "peak within the budget",
            f"{own['peak_bytes'] / MB:.1f} of {own['budget_bytes'] / MB:.1f} MB",
            own["peak_bytes"] <= own["budget_bytes"],
        ),
        verdict("every loss is plain PyTorch's", f"largest difference {max(differences):.1e}", max(differences) == 0),
        verdict(f"test losses within {TEST_TOLERANCE}", f"{test_difference:.1e}", test_difference <= TEST_TOLERANCE),
        verdict("it learnt", f"training loss {losses[0]:.3f} -> {losses[-1]:.3f}", losses[-1] < losses[0]),
    ]
    if arguments.quick:
        print("\n".join(page))
        return
    write_results(
        "shakespeare",
        "A language model many times larger than its budget",
        "\n".join(page),
        {"ours": {**own, "losses": losses}, "plain": reference},
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
