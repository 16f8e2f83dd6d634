"""What compiled layers gain: samples per second with --compile and without, and what compiling takes.

An MLP, a ResNet-18 of half width, a vision transformer and a GPT, each by backprop in a budget that holds it, so that nothing is waited
for. The two contenders take turns, each in a process of its own; of each the best epoch of all rounds counts, the first epoch being a
warm-up, since others on the machine can only make it slower. Where these do, the ratio of CPU seconds says more. What the compiler has
made is kept on disk by PyTorch and found again by later runs: the first round of --compile is given an empty cache, and the seconds of
compiling are those of that round.

    python bench/compiling.py [--only mlp,resnet18,vit,gpt] [--rounds 2] [--quick]

About 30 minutes on one core. There is no reference to be measured against: PyTorch gives no figures for training on a CPU.
"""

import argparse
import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import RESULTS, arguments_of, distinct, fit, machine, markdown_table, write_results
from workloads import Network, chosen, fields_of

MB = 1e6
STEPS, EPOCHS = 3, 4

NETWORKS = {
    "mlp": Network("mlp:" + "-".join(["1024"] * 13) + "-10", "grey", 256),
    "resnet18": Network("cifar-resnet18", "images", 32, {"width": "0.5"}),
    "vit": Network("networks:vit", "images", 32, {"depth": "6", "width": "256", "heads": "4"}),
    "gpt": Network("gpt:layers=6,width=256,heads=4,context=128", "text", 8, context=128),
}
SMALLER = {
    "mlp": Network("mlp:1024-256-256-10", "grey", 32),
    "gpt": Network("gpt:layers=2,width=64,heads=4,context=32", "text", 8, context=32),
}


def run(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run in a folder of its own: its result, the least seconds of an epoch after the first, and the mean CPU seconds of these."""
    result, lines, _ = fit(folder, *arguments_of(fields))
    ends = lines[STEPS - 1 :: STEPS]
    seconds = min(late["seconds"] - early["seconds"] for early, late in pairwise(ends))
    # In ticks of 10 ms, as the system counts them.
    cpu_seconds = max(0.01, ends[-1]["cpu_seconds"] - ends[0]["cpu_seconds"]) / (len(ends) - 1)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "result": result}


def measure(name: str, network: Network, rounds: int) -> dict[str, Any]:
    """Both contenders, in turns."""
    with tempfile.TemporaryDirectory() as place:
        folder, samples = Path(place), network.batch * STEPS
        alike = {"max_gpu_mem": "1500MB", "method": "backprop", "micro_batch": network.batch}
        fields = {**fields_of(network, folder, STEPS, EPOCHS), **alike}
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
        found: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for number in range(rounds):
            for with_compiled_layers in (False, True):
                found[with_compiled_layers].append(
                    run(
                        {**fields, **({"compile": True} if with_compiled_layers else {})},
                        folder / f"run{number}{with_compiled_layers}",
                    )
                )
                seconds, cpu = (found[with_compiled_layers][-1][key] for key in ("seconds", "cpu_seconds"))
                print(
                    name,
                    number + 1,
                    "compiled" if with_compiled_layers else "as it is",
                    f"{seconds:.2f} s, {cpu:.2f} s of CPU",
                    flush=True,
                )

    def best(key: str) -> tuple[float, float]:
        return min(run[key] for run in found[False]), min(run[key] for run in found[True])

    (plain, code), (plain_cpu, code_cpu) = best("seconds"), best("cpu_seconds")
    results = {with_compiled_layers: [run["result"] for run in runs] for with_compiled_layers, runs in found.items()}
    return {
        "samples_per_second": {"as it is": samples / plain, "compiled": samples / code},
        "ratio": plain / code,
        "ratio_of_cpu_seconds": plain_cpu / code_cpu,
        "peak_bytes": {"as it is": max(r["peak_bytes"] for r in results[False]), "compiled": max(r["peak_bytes"] for r in results[True])},
        "predicted_peak_bytes": results[True][0]["predicted_peak_bytes"],
        "train_loss": {"as it is": results[False][0]["train_loss"], "compiled": results[True][0]["train_loss"]},
        "layers": results[True][0]["compiled"]["layers"],
        "functions": results[True][0]["compiled"]["functions"],
        "seconds": results[True][0]["compiled"]["seconds"],
        "seconds_again": results[True][-1]["compiled"]["seconds"] if rounds > 1 else None,
    }  # fmt: skip


def table_of(found: dict[str, dict[str, Any]]) -> str:
    heads = (
        "network", "samples/s", "compiled", "ratio", "of CPU", "layers", "functions", "compiling, s", "from the cache, s", "peak, MB",
        "compiled", "planned", "loss", "compiled",
    )  # fmt: skip
    rows = [
        (
            name,
            f"{figures['samples_per_second']['as it is']:.1f}",
            f"{figures['samples_per_second']['compiled']:.1f}",
            f"{figures['ratio']:.2f}",
            f"{figures['ratio_of_cpu_seconds']:.2f}",
            str(figures["layers"]),
            str(figures["functions"]),
            f"{figures['seconds']:.0f}",
            "-" if figures["seconds_again"] is None else f"{figures['seconds_again']:.0f}",
            f"{figures['peak_bytes']['as it is'] / MB:.1f}",
            f"{figures['peak_bytes']['compiled'] / MB:.1f}",
            f"{figures['predicted_peak_bytes'] / MB:.1f}",
            f"{figures['train_loss']['as it is']:.5f}",
            f"{figures['train_loss']['compiled']:.5f}",
        )
        for name, figures in found.items()
    ]
    return markdown_table(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma list of networks; figures of others are kept")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two small networks, one round; nothing is written")
    arguments = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    networks = SMALLER if arguments.quick else NETWORKS
    names = chosen(parser, arguments.only, networks)
    file = RESULTS / "compiling.json"
    kept = json.loads(file.read_text())["networks"] if arguments.only and not arguments.quick and file.exists() else {}
    found: dict[str, dict[str, Any]] = {name: kept[name] for name in kept if name not in names}
    for name in names:
        found[name] = {**measure(name, networks[name], 1 if arguments.quick else arguments.rounds), "machine": machine()}
        text = (
            f"{__doc__.split(chr(10) * 2)[1]}\n\nBatches of {', '.join(f'{networks[name].batch} ({name})' for name in found)}; {STEPS} "
            "steps an epoch. A function is a forward with its backward, or a forward for eval mode: a shape of layers has two. Peaks are "
            f"above the floor.\n\n{table_of(found)}"
        )
        if arguments.quick:
            print(text)
        else:
            machines = distinct([figures["machine"] for figures in found.values()])
            write_results("compiling", "Compiled layers", text, {"networks": found}, machines=machines)


if __name__ == "__main__":
    main()
