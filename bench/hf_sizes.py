"""What fits: published language models planned in 2, 4 and 8 GB, trained in full and with adapters, without having their weights.

Each shape (`bench/shapes/`) is planned by `exact` on the CPU: AdamW, batches of 8 samples of 512 tokens; in full all in float32, with
adapters rank 16 on q_proj and v_proj beside a base kept in bf16. A plan allocates nothing; that plans hold is what `bench/predictions.py`
and every run's own check are for. Beside it what plain PyTorch needs by the same arithmetic.

    python bench/hf_sizes.py [--quick]

Needs transformers. Two minutes on two cores; --quick takes the smallest shape.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, markdown_table, write_results

SHAPES = RESULTS.parent / "shapes"
NAMES = {"qwen3-0.6b": "Qwen3-0.6B", "llama-3.2-1b": "Llama-3.2-1B", "llama-3.1-8b": "Llama-3.1-8B"}
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora": "r=16,targets=q_proj+v_proj", "frozen_dtype": "bf16"},
}
BUDGETS = (2_000_000_000, 4_000_000_000, 8_000_000_000)
BATCH, CONTEXT, SAMPLES = 8, 512, 2_000


def plans_of(shape: str, way: str, tokens: Path) -> dict[str, Any]:
    """Return the plans of a shape in every budget, and what is asked of the smallest one."""
    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.errors import BudgetError
    from lowmem_pnn.planning.describe import describe_plan
    from lowmem_pnn.planning.make_plan import make_plan, smallest_budget_of
    from lowmem_pnn.planning.request import PlanRequest
    from lowmem_pnn.training.setup import open_workload
    from lowmem_pnn.workload import profile_workload
    from lowmem_pnn.workload.inputs import named_inputs

    config = configure(
        max_gpu_mem=BUDGETS[-1], model=f"hf:{SHAPES / shape}.json", data=f"tokens:{tokens},dtype=uint16", method="exact", device="cpu",
        context=CONTEXT, batch_size=BATCH, epochs=1, optimizer="adamw", val_fraction=0.0, test_fraction=0.0, **WAYS[way],
    )  # fmt: skip
    with open_workload(config, named_inputs(config)) as (device, workload):
        request = PlanRequest(workload, profile_workload(workload, device), device)
        try:
            make_plan(request)
            smallest: int | None = smallest_budget_of(request)
        except BudgetError as error:
            smallest = error.enough_bytes
        reports = []
        for budget in BUDGETS:
            other = copy.copy(device)
            other.budget_bytes = budget
            reports.append(describe_plan(dataclasses.replace(request, device=other)))
    steps = SAMPLES // BATCH
    return {
        "smallest_bytes": smallest,
        "plain_bytes": reports[0].plain_bytes,
        "state_bytes": reports[0].training_state_bytes,
        "budgets": {
            report.budget_bytes: {
                "partitions": len(report.partitions),
                "peak_bytes": report.predicted_peak_bytes,
                "disk_bytes": report.disk_bytes,
                "written_per_step": (report.written_bytes or 0) // steps,
            }
            for report in reports
            if report.fits
        },
    }


def main() -> None:
    """Plan all shapes and write the page."""
    import numpy as np

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest shape: a minute of processor time; writes no page")
    arguments = parser.parse_args()
    names = [*NAMES][:1] if arguments.quick else [*NAMES]
    rows, data = [], []
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.bin"
        np.zeros(SAMPLES * CONTEXT + 1, np.uint16).tofile(tokens)
        for shape in names:
            for way in WAYS:
                with contextlib.redirect_stderr(io.StringIO()):
                    found = plans_of(shape, way, tokens)
                cells = []
                for budget in BUDGETS:
                    fits = found["budgets"].get(budget)
                    cells.append(f"{fits['partitions']} parts, {fits['written_per_step'] / 1e9:.1f} GB" if fits else "no")
                disk = max((one["disk_bytes"] for one in found["budgets"].values()), default=0)
                rows.append(
                    [
                        NAMES[shape],
                        way,
                        f"{found['plain_bytes'] / 1e9:.1f} GB",
                        f"{found['smallest_bytes'] / 1e9:.2f} GB",
                        f"{found['plain_bytes'] / found['smallest_bytes']:.0f}",
                        *cells,
                        f"{disk / 1e9:.0f} GB" if disk else "-",
                    ]
                )
                data.append({"shape": NAMES[shape], "way": way, **found})
                print(*rows[-1], sep="\t", file=sys.stderr, flush=True)
    heads = (
        "model",
        "",
        "plain PyTorch",
        "smallest budget",
        "ratio",
        *(f"in {budget // 10**9} GB" for budget in BUDGETS),
        "disk",
    )
    text = "\n".join(
        [
            f"`exact`, AdamW, batches of {BATCH} x {CONTEXT} tokens, CPU, no validation. In a budget: partitions, and bytes written in a step.",
            "All of it planned: no weights are there. `LoRA`: rank 16 on q_proj and v_proj, the base frozen in bf16; plain PyTorch with the",
            "same base.",
            "",
            markdown_table(heads, rows),
        ]
    )
    write_results(
        "hf_sizes", "What fits: published language models in small budgets", text, {"plans": data}, write=not arguments.quick
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
