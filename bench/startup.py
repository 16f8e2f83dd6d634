"""How long the commands take before anything happens: `--help`, and `plan` of a ResNet-50 beyond importing torch.

A plan alone (`--no-timing`) is one figure; one that times layers, to say what every method would take, is another: running them takes
two seconds, and the heads of `neuroflux` are profiled too.

    python bench/startup.py [--rounds 5] [--quick]

--quick takes one round. Every command is a process of its own; the fastest of the rounds counts,
since a busy machine only adds. Files go where TMPDIR says.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import lowmem_pnn, markdown_table, run_process, write_results

HELP_GOAL, PLAN_GOAL = 0.3, 5.0


def fastest(command: list[str], rounds: int) -> float:
    """Wall seconds of a command."""
    return min(run_process(command).seconds for _ in range(rounds))


def main() -> None:
    """Time the commands and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round; writes no page")
    arguments = parser.parse_args()
    rounds = 1 if arguments.quick else arguments.rounds
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "data.npz"
        np.savez(file, x_train=np.zeros((100, 32, 32, 3), np.uint8), y_train=np.arange(100) % 10)
        plan = lowmem_pnn(
            "plan", "--max-gpu-mem", "600MB", "--device", "cpu", "--model", "resnet50", "--data", f"npz:{file}", "--json"
        )
        seconds = {
            "help": fastest(lowmem_pnn("--help"), rounds),
            "torch": fastest([sys.executable, "-c", "import torch"], rounds),
            "torchvision": fastest([sys.executable, "-c", "import torchvision"], rounds),
            "plan": fastest([*plan, "--no-timing"], rounds),
            "timed_plan": fastest(plan, rounds),
        }
    beyond, timed = (seconds[name] - seconds["torch"] for name in ("plan", "timed_plan"))
    rows = [
        ("lowmem-pnn --help", f"{seconds['help']:.2f}", f"{HELP_GOAL}", f"{seconds['help'] / HELP_GOAL:.2f}"),
        ("plan --no-timing of ResNet-50, beyond importing torch", f"{beyond:.2f}", f"{PLAN_GOAL}", f"{beyond / PLAN_GOAL:.2f}"),
        (
            "plan of ResNet-50, all methods timed, beyond importing torch",
            f"{timed:.2f}",
            f"{PLAN_GOAL}",
            f"{timed / PLAN_GOAL:.2f}",
        ),
        ("importing torch", f"{seconds['torch']:.2f}", "-", "-"),
        ("importing torchvision, torch included", f"{seconds['torchvision']:.2f}", "-", "-"),
    ]
    met = [
        f"- {words}: {'met' if found <= goal else 'NOT MET'}"
        for words, found, goal in (
            (f"--help in under {HELP_GOAL} s", seconds["help"], HELP_GOAL),
            (f"plan --no-timing of ResNet-50 in under {PLAN_GOAL:g} s beyond importing torch", beyond, PLAN_GOAL),
            (f"plan of ResNet-50, all methods timed, in under {PLAN_GOAL:g} s beyond importing torch", timed, PLAN_GOAL),
        )
    ]
    text = "\n".join([markdown_table(("command", "seconds", "goal", "ratio"), rows), "", *met])
    write_results("startup", "Start-up", text, {"seconds": seconds}, write=not arguments.quick)


if __name__ == "__main__":
    main()
