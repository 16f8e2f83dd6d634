"""The paper's network on EMNIST: PNN beside its baseline, beside the paper's figures.

Partitioned Neural Network training (arXiv 2403.11204, section 4): 784-80-60-60-60-47, ReLU after every layer but the last, cut after
the second hidden layer, kappa 10, SGD 0.01, momentum 0.9, batch 1410, 5 epochs left and 160 right; the baseline 40 epochs.

    python bench/emnist.py --data emnist-balanced               # downloads the official balanced split
    python bench/emnist.py --data npz:emnist47.npz [--runs 3]   # any file with x_train, y_train, x_test, y_test and 47 classes
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from common import lowmem_pnn, markdown_table, run_process, write_results

MODEL = "mlp:784-80-60-60-60-47"
COMMON = ["--model", MODEL, "--batch-size", "1410", "--optimizer", "sgd", "--lr", "0.01", "--momentum", "0.9", "--device", "cpu"]
COMMON += ["--val-fraction", "0", "--max-gpu-mem", "200MB"]
RECIPES = {
    "baseline, 40 epochs": (["--method", "backprop", "--epochs", "40"], 76.2),
    "PNN, 5 + 160 epochs": (["--method", "pnn", "--cuts", "2", "--epochs", "5,160", "--kappa", "10"], 71.5),
}


def default_data() -> str:
    """The stand-in file where there is one, else the official split."""
    folder = os.environ.get("LOWMEM_PNN_DATA")
    file = Path(folder) / "emnist47.npz" if folder else None
    return f"npz:{file}" if file is not None and file.exists() else "emnist-balanced"


def main() -> None:
    """Run each recipe with several seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=default_data())
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    rows, data = [], {}
    for name, (options, paper) in RECIPES.items():
        results = []
        for seed in range(arguments.runs):
            with tempfile.TemporaryDirectory() as folder:
                command = lowmem_pnn("fit", *COMMON, *options, "--data", arguments.data, "--seed", str(seed))
                results.append(json.loads(run_process([*command, "--workdir", f"{folder}/run", "--json", "--quiet"]).stdout))
        accuracies = [100 * result["test_accuracy"] for result in results]
        mean = statistics.mean(accuracies)
        data[name] = {"paper": paper, "accuracies": accuracies, "results": results}
        rows.append(
            (
                name, f"{paper:.1f}", f"{mean:.1f}", f"{statistics.pstdev(accuracies):.1f}", f"{mean - paper:+.1f}",
                "yes" if abs(mean - paper) <= 2 else "no", f"{statistics.mean(result['seconds'] for result in results):.0f}",
            )
        )  # fmt: skip
    official = arguments.data == "emnist-balanced"
    note = (
        "Data: the official balanced split, as in the paper."
        if official
        else "Data: **not the paper's split**. The paper trains on the official EMNIST balanced split (112,800 training and 18,800 test "
        f"images). This is {Path(arguments.data).name}: images of the same 47 classes, 95,495 to train (767 to 2,400 a class) and 7,050 "
        "to test (150 a class, from the official by-merge test split)."
    )
    heads = ("", "paper %", "ours %", "deviation", "difference", "within 2 points", "seconds")
    text = "\n".join(
        [
            f"{MODEL}, SGD 0.01, momentum 0.9, batch 1410, {arguments.runs} runs (seeds 0 to {arguments.runs - 1}), CPU. Test accuracy.",
            note,
            "Training samples are shuffled every epoch; the paper does not shuffle its left partition's.",
            "",
            markdown_table(heads, rows),
        ]
    )
    write_results("emnist", "PNN on EMNIST, beside the paper", text, {"data": Path(arguments.data).name, "recipes": data})


if __name__ == "__main__":
    main()
