"""Does the peak stay inside one budget however deep the model is?

Trains multilayer perceptrons of width 2048 and 8, 16, 32, 64 hidden layers (AdamW, batch 64, scikit-learn's digits, one epoch) in
one budget of 256 MB, each in a process of its own, beside plain PyTorch on the same model, batches and optimizer.

    python bench/peak_memory.py [--depths 8,16,32,64] [--budget 256MB] [--quick]

Some minutes on two cores; --quick takes 2 and 4 layers.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from common import lowmem_pnn, markdown_table, run_process, write_results

WIDTH = 2048
BATCH = 64
SEED = 0
MB = 1e6


def model_spec(depth: int) -> str:
    """`depth` hidden layers of WIDTH between 64 pixels and 10 classes."""
    return "mlp:" + "-".join(["64", *[str(WIDTH)] * depth, "10"])


def ours(depth: int, budget: str) -> dict[str, float]:
    """One run of the command."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["fit", "--max-gpu-mem", budget, "--device", "cpu", "--model", model_spec(depth), "--data", "digits"]
        command += ["--epochs", "1", "--lr", "1e-4", "--kappa", "1", "--batch-size", str(BATCH), "--seed", str(SEED)]
        done = run_process(lowmem_pnn(*command, "--workdir", f"{folder}/run", "--json", "--quiet"))
    result = json.loads(done.stdout)
    return {
        "training_state": result["training_state_bytes"],
        "partitions": len(result["partitions"]),
        "predicted": result["predicted_peak_bytes"],
        "peak": result["peak_bytes"],
        "rss": done.peak_rss_bytes,
        "epoch_seconds": sum(partition["seconds"] for partition in result["partitions"]),
        "all_seconds": done.seconds,
        "read": result["bytes_read"],
        "written": result["bytes_written"],
        "budget": result["budget_bytes"],
        "reserve": result["reserve_bytes"],
    }


def plain(depth: int) -> None:
    """The same work in plain PyTorch, measured by the same meter; prints JSON."""
    import torch

    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.device import CpuDevice
    from lowmem_pnn.workload import open_data

    config = configure(max_gpu_mem="1TB", model=model_spec(depth), data="digits", seed=SEED)
    inputs = open_data(config)
    source, splits = inputs.source, inputs.splits
    train = splits["train"]
    with CpuDevice(config.max_gpu_mem) as device:
        torch.manual_seed(SEED)
        model = source.build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
        began = time.monotonic()
        order = torch.randperm(len(train)).numpy()
        for begin in range(0, len(order), BATCH):
            samples, labels = train.batch(order[begin : begin + BATCH])
            loss = torch.nn.functional.cross_entropy(model(samples), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(json.dumps({"peak": device.peak_bytes, "epoch_seconds": time.monotonic() - began}))


def main() -> None:
    """Run all depths and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="8,16,32,64")
    parser.add_argument("--budget", default="256MB")
    parser.add_argument("--quick", action="store_true", help="2 and 4 layers; writes no page")
    parser.add_argument("--plain", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain is not None:
        plain(arguments.plain)
        return
    rows, data = [], []
    depths = [2, 4] if arguments.quick else [int(depth) for depth in arguments.depths.split(",")]
    for depth in depths:
        own = ours(depth, arguments.budget)
        other = run_process([sys.executable, __file__, "--plain", str(depth)])
        reference = {**json.loads(other.stdout), "rss": other.peak_rss_bytes}
        data.append({"depth": depth, "ours": own, "plain": reference})
        rows.append(
            (
                str(depth),
                f"{own['training_state'] / MB:.0f}",
                f"{own['partitions']:.0f}",
                f"{own['predicted'] / MB:.1f}",
                f"{own['peak'] / MB:.1f}",
                f"{own['predicted'] / own['peak'] - 1:+.1%}",
                f"{own['rss'] / MB:.0f}",
                f"{own['epoch_seconds']:.1f}",
                f"{own['read'] / MB:.0f}",
                f"{own['written'] / MB:.0f}",
                f"{reference['peak'] / MB:.0f}",
                f"{reference['rss'] / MB:.0f}",
                f"{reference['epoch_seconds']:.1f}",
                f"{own['peak'] / reference['peak']:.2f}",
                f"{own['epoch_seconds'] / reference['epoch_seconds']:.2f}",
            )
        )
        print(*rows[-1], sep="\t", file=sys.stderr, flush=True)
    heads = (
        "layers", "training state MB", "partitions", "predicted peak MB", "peak MB", "predicted/peak", "RSS MB", "s/epoch",
        "read MB", "written MB", "plain peak MB", "plain RSS MB", "plain s/epoch", "peak ratio", "time ratio",
    )  # fmt: skip
    first, last = data[0]["ours"], data[-1]["ours"]
    per_layer = [entry["ours"]["epoch_seconds"] / entry["depth"] for entry in data]
    text = "\n".join(
        [
            f"Budget {arguments.budget}; multilayer perceptron 64-{WIDTH}x(layers)-10, AdamW (fused), batch {BATCH}, digits, pnn, one epoch",
            "per partition. Peaks are private memory above the floor; RSS is the process's whole, files and imports included.",
            "An epoch of ours is learning, writing boundaries, and committing, for all partitions.",
            "",
            markdown_table(heads, rows),
            "",
            f"- within the budget at every depth: {all(entry['ours']['peak'] <= entry['ours']['budget'] for entry in data)}",
            f"- peak from {depths[0]} to {depths[-1]} layers: {last['peak'] / first['peak'] - 1:+.1%} (goal: at most +5 %)",
            f"- seconds per epoch and layer: {', '.join(f'{value:.2f}' for value in per_layer)} (linear where these are alike)",
        ]
    )
    write_results("peak_memory", "Peak memory against depth, one budget", text, {"depths": data}, write=not arguments.quick)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
