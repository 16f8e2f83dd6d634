"""What shorter optimizer state is worth: bytes in memory and on disk, seconds, and what is learnt with it.

First the step alone, of one weight, beside torchao's own 8-bit AdamW: with `torch.compile`, which it is made for, and without. Then two
networks trained by `--method exact` with the state of AdamW in fp32, bf16 and int8, and in memory by plain PyTorch: in fp32, with moments
that are rounded to the nearest bfloat16 after every step, and by torchao's AdamW8bit, compiled.

    python bench/optimizer_state.py [--seeds 0,1] [--quick] [--again]

EMNIST is $LOWMEM_PNN_DATA/emnist47.npz where there is one, else the official split; the text $LOWMEM_PNN_DATA/tinyshakespeare.txt, else
random bytes. Finished runs are kept in bench/.cache/.
"""

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from common import (
    Cache,
    StepMeter,
    arguments_of,
    default_emnist,
    emnist_in_words,
    fit,
    last_json,
    markdown_table,
    place_text,
    run_process,
    step_means,
    write_results,
)

MB = 1e6
WIDTH = 2048  # of the weight that is stepped alone
STEPS_ALONE = 12
SKIP = 2  # steps that are not measured: what is allocated and compiled once
LR = 1e-3
OURS = ("fp32", "bf16", "int8")
PLAIN = {
    "plain": "plain PyTorch, fp32",
    "nearest": "plain PyTorch, moments rounded to the nearest bf16",
    "eager": "torchao AdamW8bit, not compiled",
    "compiled": "torchao AdamW8bit, compiled",
}
TASKS: dict[str, dict[str, Any]] = {
    "MLP on EMNIST": {
        "model": "mlp:784-1024-1024-47", "cuts": "1,2", "batch_size": 128, "train_limit": 12_800, "epochs": 3, "max_gpu_mem": "150MB",
    },
    "GPT on text": {
        "model": "gpt:layers=2,width=192,heads=4,context=64", "cuts": "1,2", "batch_size": 16, "train_limit": 1600, "test_limit": 128,
        "epochs": 1, "max_gpu_mem": "150MB",
    },
}  # fmt: skip
MEANS = ("state_bytes", "written", "seconds", "cpu_seconds", "peak", "largest_weight")
QUICK = {"train_limit": 512, "test_limit": 64, "epochs": 1}

# The step alone, and training in memory; each in a process of its own, which prints JSON as its last line.


def make_optimizer(kind: str, named: dict[str, Any]) -> Any:
    """An optimizer over parameters, in memory.

    Args:
        kind: one of `OURS` or `PLAIN`.
        named: parameters by name.
    """
    import torch

    from lowmem_pnn.optim.low_precision import load_int8_levels
    from lowmem_pnn.optim.optimizers import OptimizerSpec

    if kind in ("plain", "nearest"):
        return torch.optim.AdamW(named.values(), lr=LR, weight_decay=0.0, fused=True)
    if kind in ("eager", "compiled"):
        from torchao.optim import AdamW8bit

        if kind == "eager":
            torch.compiler.set_stance("force_eager")
        return AdamW8bit(named.values(), lr=LR, weight_decay=0.0)
    if kind == "int8":
        load_int8_levels()
    spec = OptimizerSpec("adamw", lr=LR, state=kind)  # type: ignore[arg-type]
    state = {
        name: {key: torch.zeros(shape, dtype=dtype) for key, (dtype, shape) in spec.layout(parameter).items()}
        for name, parameter in named.items()
    }
    return spec.build(named, state)


def state_bytes(optimizer: Any) -> int:
    """Of all tensors in its state but counts of steps, those inside torchao's included."""
    tensors = [tensor for state in optimizer.state.values() for key, tensor in state.items() if key != "step"]
    inner = [[tensor.codes, tensor.scale] if hasattr(tensor, "codes") else [tensor] for tensor in tensors]
    return sum(part.nbytes for parts in inner for part in parts)


def step_alone(kind: str) -> None:
    """One weight, stepped again and again."""
    import torch

    weight = torch.nn.Parameter(torch.randn(WIDTH, WIDTH))
    weight.grad = torch.randn(WIDTH, WIDTH)
    small = torch.nn.Parameter(torch.zeros(1))
    small.grad = torch.zeros(1)
    make_optimizer(kind, {"small": small}).step()  # imports belong to the floor
    meter = StepMeter()
    meter.begin()
    optimizer = make_optimizer(kind, {"weight": weight})
    meter.lap()
    for _ in range(STEPS_ALONE):
        optimizer.step()
        meter.lap()
    print(json.dumps({**meter.figures(SKIP), "state_bytes": state_bytes(optimizer)}))


def in_memory(kind: str, fields: dict[str, Any]) -> None:
    """The whole model, stepped by plain PyTorch or torchao."""
    import numpy as np
    import torch

    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.seeds import permutation_of
    from lowmem_pnn.workload import open_data

    config = configure(method="exact", **fields)
    inputs = open_data(config)
    source, splits = inputs.source, inputs.splits
    train, test = splits["train"], splits["test"]
    torch.manual_seed(config.seed)
    model: Any = source.build()
    optimizer = make_optimizer(kind, dict(model.named_parameters()))
    meter = StepMeter()
    meter.begin()
    meter.lap()

    def loss_of(samples: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(model(samples).flatten(0, -2), labels.flatten())

    for epoch in range(config.epochs[0]):
        losses = []
        order = permutation_of(len(train), config.seed, "epoch", epoch)
        for begin in range(0, len(order), config.batch_sizes[0]):
            loss = loss_of(*train.batch(order[begin : begin + config.batch_sizes[0]]))
            loss.backward()
            optimizer.step()
            if kind == "nearest":
                for state in optimizer.state.values():
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name].copy_(state[name].bfloat16())
            optimizer.zero_grad()
            losses.append(loss.item())
            meter.lap()
    model.eval()
    with torch.no_grad():
        parts = [test.batch(np.arange(begin, min(begin + 64, len(test)))) for begin in range(0, len(test), 64)]
        loss = sum(float(loss_of(x, y)) * len(y) for x, y in parts) / len(test)
        right = sum(int((model(x).flatten(0, -2).argmax(-1) == y.flatten()).sum()) for x, y in parts)
    figures = meter.figures(SKIP)
    print(
        json.dumps(
            {
                "seconds": figures["seconds"],
                "cpu_seconds": figures["cpu_seconds"],
                "written": 0.0,
                "peak": figures["private_above_imports"],
                "train_loss": fmean(losses),
                "test_loss": loss,
                "test_accuracy": right / sum(y.numel() for _, y in parts),
                "largest_weight": max(float(parameter.detach().abs().max()) for parameter in model.parameters()),
                "state_bytes": state_bytes(optimizer) / sum(parameter.numel() for parameter in model.parameters()),
            }
        )
    )


def exact(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Our run: figures as `in_memory` has them."""
    import torch
    from safetensors.torch import load_file

    from lowmem_pnn.optim.optimizers import OptimizerSpec
    from lowmem_pnn.zoo.models import find_model

    with torch.device("meta"):
        parameters = list(find_model(fields["model"], {}, None).build().parameters())
    num_params = sum(parameter.numel() for parameter in parameters)
    spec = OptimizerSpec("adamw", state=kind)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        given = {**fields, "method": "exact", "optimizer_state": kind, "commit_every": 1_000_000}
        result, lines, _ = fit(Path(folder) / "run", *arguments_of(given))
        weights = load_file(result["weights_file"])
        means = step_means(lines, SKIP)
        return {
            "seconds": means["seconds"],
            "cpu_seconds": means["cpu_seconds"],
            "written": means["written"] / num_params,
            "peak": result["peak_bytes"],
            "predicted": result["predicted_peak_bytes"],
            "train_loss": result["train_loss"],
            "test_loss": result["test_loss"],
            "test_accuracy": result["test_accuracy"],
            "largest_weight": max(float(tensor.abs().max()) for tensor in weights.values()),
            "state_bytes": sum(map(spec.state_bytes, parameters)) / num_params,
        }


def in_process(*arguments: str) -> dict[str, Any]:
    """What another process of this file prints."""
    found: dict[str, Any] = last_json(run_process([sys.executable, __file__, *arguments]).stdout)
    return found


# Tables.


def table_alone(found: dict[str, dict[str, Any]]) -> str:
    """A row per way to step."""
    size, base = WIDTH**2, found["plain"]
    heads = (
        "AdamW",
        "state, bytes a parameter",
        "ns a parameter",
        "ratio",
        "peak above weights and gradients, MB",
        "of that state, MB",
    )
    rows = [
        (
            PLAIN.get(kind, f"ours, {kind}"), f"{own['state_bytes'] / size:.2f}", f"{1e9 * own['cpu_seconds'] / size:.1f}",
            f"{own['cpu_seconds'] / base['cpu_seconds']:.1f}", f"{own['private_above_imports'] / MB:.1f}",
            f"{own['state_bytes'] / MB:.1f}",
        )
        for kind, own in found.items()
    ]  # fmt: skip
    return markdown_table(heads, rows)


def table_of_task(found: dict[str, list[dict[str, Any]]]) -> str:
    """A row per way to train; means over seeds."""
    heads = (
        "AdamW", "state, bytes a parameter", "written a step, bytes a parameter", "ms a step", "CPU ms a step", "peak MB",
        "training loss", "test loss", "test accuracy %", "largest weight",
    )  # fmt: skip
    rows = []
    for kind, runs in found.items():
        mean = {key: fmean(run[key] for run in runs) for key in MEANS}
        rows.append(
            (
                PLAIN.get(kind, f"ours (exact), {kind}"), f"{mean['state_bytes']:.2f}", f"{mean['written']:.2f}",
                f"{1e3 * mean['seconds']:.0f}", f"{1e3 * mean['cpu_seconds']:.0f}", f"{mean['peak'] / MB:.1f}",
                spread(runs, "train_loss", 1), spread(runs, "test_loss", 1), spread(runs, "test_accuracy", 100),
                f"{mean['largest_weight']:.2f}",
            )
        )  # fmt: skip
    return markdown_table(heads, rows)


def spread(runs: list[dict[str, Any]], key: str, factor: float) -> str:
    """A mean, and half of what lies between the seeds."""
    if runs[0][key] is None:
        return "-"
    values = [factor * run[key] for run in runs]
    digits = 2 if factor > 1 else 4
    return f"{fmean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def main() -> None:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--quick", action="store_true", help="a few steps of each, one seed, nothing compiled; writes no page")
    parser.add_argument("--again", action="store_true", help="forget the runs that are finished")
    parser.add_argument("--alone", metavar="KIND", help=argparse.SUPPRESS)
    parser.add_argument("--in-memory", nargs=2, metavar=("KIND", "FIELDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        step_alone(arguments.alone)
        return
    if arguments.in_memory:
        in_memory(arguments.in_memory[0], json.loads(arguments.in_memory[1]))
        return
    seeds = [0] if arguments.quick else [int(seed) for seed in arguments.seeds.split(",")]
    cache = Cache("optimizer_state_quick" if arguments.quick else "optimizer_state", arguments.again)
    plain = [kind for kind in PLAIN if not (arguments.quick and kind == "compiled")]
    alone = {
        kind: cache.get({"alone": kind}, partial(in_process, "--alone", kind))
        for kind in ("plain", *OURS, *plain)
        if kind != "nearest"
    }
    lines = [
        f"## The step of one weight of {WIDTH} x {WIDTH}",
        "",
        "CPU time, imports not counted; the gradient stays the same. Peaks are private memory, compiling included.",
        "",
        table_alone(alone),
        "",
    ]
    tasks: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        text, words = place_text(None, Path(folder), seed=0)
        data = {"MLP on EMNIST": default_emnist(), "GPT on text": f"text:{text}"}
        for task, settings in TASKS.items():
            found = tasks.setdefault(task, {})
            for kind in (*OURS, *(kind for kind in plain if kind != "eager")):
                # What takes minutes has one seed.
                for seed in seeds[:1] if kind == "compiled" or task == "GPT on text" else seeds:
                    fields = {
                        **settings, **(QUICK if arguments.quick else {}), "data": data[task], "lr": LR, "seed": seed, "val_fraction": 0.0,
                    }  # fmt: skip
                    run = (
                        partial(in_process, "--in-memory", kind, json.dumps(fields))
                        if kind in PLAIN
                        else partial(exact, kind, fields)
                    )
                    key = {"task": task, "kind": kind, **fields, "data": ""}
                    found.setdefault(kind, []).append(cache.get(key, run))
            steps = fields["train_limit"] // fields["batch_size"] * fields["epochs"]
            lines += [
                f"## {task}: {fields['model']}, {steps} steps of {fields['batch_size']}",
                "",
                emnist_in_words(data[task]) if "EMNIST" in task else f"Data: {words}.",
                "",
                table_of_task(found),
                "",
            ]
            base, short = found["fp32"][0], found["int8"][0]
            counts = ", ".join(f"{PLAIN.get(kind, kind)} {len(runs)}" for kind, runs in found.items())
            lines += [f"Means of runs with a seed each, and half of what lies between them; runs: {counts}.", ""]
            lines += [
                f"- state of int8 over fp32: {short['state_bytes'] / base['state_bytes']:.2f}; written a step: "
                f"{short['written'] / base['written']:.2f} (expected about 6 of 12 bytes a parameter)",
                "",
            ]
    if arguments.quick:
        print("\n".join(lines))
        return
    write_results(
        "optimizer_state", "Shorter optimizer state", "\n".join(lines), {"alone": alone, "tasks": tasks}, machines=cache.machines
    )


if __name__ == "__main__":
    main()
