"""What does it cost to train a model that does not fit, and is it still the same training?

A multilayer perceptron of 100.8 million parameters (24 x [Linear 2048, LayerNorm, ReLU] and a head; AdamW, batch 64, float32) whose
weights, gradients and moments are 1.61 GB: ours within a budget, plain PyTorch, and what others offer for such a model, each in a
process of its own on the same weights and batches. Peaks, CPU and wall seconds of a step, bytes written, and whether the losses are
plain PyTorch's. Then the same with gradients clipped, and at twice the depth, where the peak must not grow.

    python bench/larger_than_memory.py [--steps 12] [--depths 24,48] [--budget 280MB] [--threads 1] [--rivals-python PATH]
        [--only NAMES] [--quick]

The rivals' packages want an environment of their own, with the same torch; its interpreter is given by --rivals-python:

    python -m venv rivals && rivals/bin/pip install torch numpy tqdm psutil ninja setuptools wheel
    rivals/bin/pip install --no-build-isolation deepspeed
    rivals/bin/pip install --no-deps layer-to-layer-pytorch==0.3.0    # its declared bounds are torch<2 and numpy<2; it runs with newer

DeepSpeed compiles its operators at their first use: a compiler, and for NVMe the system's libaio-dev. Files go where TMPDIR says.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import StepMeter, fit, last_json, markdown_table, run_process, step_means, write_results

# torch is imported where it is used: a process inherits the peak of the one that starts it, and this one is to stay small.
if TYPE_CHECKING:
    from torch import Tensor, nn

    Step = Callable[[Tensor, Tensor], float]

WIDTH = 2048
CLASSES = 10
BATCH = 64
LR = 1e-4
CLIP = 0.5
SEED = 0
WARM_UP = 2
MB = 1e6

# Prints what a worker of ours holds once it has imported what it needs, in kibibytes: cutting and pricing a toy imports the last of it.
IMPORTS = (
    "import re; from pathlib import Path; import torch, lowmem_pnn.api; from lowmem_pnn.training.setup import warm_up_profiler;"
    "from lowmem_pnn.device.cpu import warm_up; warm_up_profiler(); warm_up(torch.device('cpu'));"
    "print(re.search(r'VmRSS:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
)

GOAL_PEAK = 300 * MB
GOAL_CPU = 1.8
GOAL_WRITTEN = 12.2
GOAL_WRITTEN_CLIPPED = 16.2
GOAL_GROWTH = 0.05


def build(depth: int = 24) -> "nn.Module":
    """The model; `--model bench/larger_than_memory.py:build`."""
    from torch import nn

    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.Linear(WIDTH, CLASSES))


def num_parameters(depth: int) -> int:
    """Of `build(depth)`."""
    return depth * (WIDTH * WIDTH + 3 * WIDTH) + WIDTH * CLASSES + CLASSES


@dataclass(frozen=True)
class Job:
    """What a contender trains."""

    depth: int
    clip: bool
    folder: Path


# -- the contenders: each imports what it needs, begins the meter, builds, and returns its step ---------------------------------------


def plain(job: Job, meter: StepMeter) -> "Step":
    """The loop that everybody writes."""
    import torch

    meter.begin()
    torch.manual_seed(SEED)
    model = build(job.depth)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)

    def step(x: "Tensor", y: "Tensor") -> float:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        torch.autograd.backward(loss)
        if job.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def checkpointing(job: Job, meter: StepMeter) -> "Step":
    """PyTorch's own means: blocks run again in backward, and a weight steps, and drops its gradient, as soon as that is there."""
    import torch
    from torch.utils.checkpoint import checkpoint

    meter.begin()
    torch.manual_seed(SEED)
    model = build(job.depth)
    optimizers = {weight: torch.optim.AdamW([weight], lr=LR, weight_decay=0.0, fused=True) for weight in model.parameters()}

    def step_in_backward(weight: "Tensor") -> None:
        optimizers[weight].step()  # type: ignore[index]
        weight.grad = None

    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(step_in_backward)

    def step(x: "Tensor", y: "Tensor") -> float:
        for block in model.children():
            x = checkpoint(block, x, use_reentrant=False)
        loss = torch.nn.functional.cross_entropy(x, y)
        torch.autograd.backward(loss)
        return loss.item()

    return step


def layer_to_layer(job: Job, meter: StepMeter) -> "Step":
    """layer-to-layer-pytorch: one layer on the device at a time, all else in the host's memory, which here is the same."""
    import torch
    from layer_to_layer_pytorch.l2l import Layer2Layer  # type: ignore[import-not-found, unused-ignore]

    meter.begin()
    torch.manual_seed(SEED)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(build(job.depth).children())
    model.train()
    trainer = Layer2Layer(model, microbatch_size=None, gpu_device="cpu")
    optimizer = torch.optim.AdamW(trainer.main_params, lr=LR, weight_decay=0.0, fused=True)

    def step(x: "Tensor", y: "Tensor") -> float:
        trainer.zero_grad()
        trainer.forward(x)
        loss = trainer.compute_loss(y, torch.nn.functional.cross_entropy)
        trainer.backward()
        optimizer.step()
        trainer.update_main_model_params()
        return float(loss)

    return step


def deepspeed_cpu(job: Job, meter: StepMeter) -> "Step":
    """ZeRO-3, weights and optimizer in the host's memory."""
    return _deepspeed(job, meter, {"device": "cpu", "pin_memory": False}, {}, {})


def deepspeed_nvme(job: Job, meter: StepMeter) -> "Step":
    """ZeRO-3, weights and optimizer on disk; the smallest buffers that hold this model's largest weight."""
    place = {"device": "nvme", "nvme_path": str(job.folder / "nvme"), "pin_memory": False}
    buffers = {"buffer_count": 6, "buffer_size": WIDTH * WIDTH + 2**17, "max_in_cpu": 0}
    # One optimizer group a weight. Weights that will be used again soon are let go, or the buffers run out.
    return _deepspeed(job, meter, place, buffers, {"sub_group_size": WIDTH * WIDTH + 2**18, "stage3_max_reuse_distance": 0})


def _deepspeed(job: Job, meter: StepMeter, place: dict[str, Any], buffers: dict[str, Any], more: dict[str, Any]) -> "Step":
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    # Its operators are compiled with the ninja of its own environment.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    import deepspeed  # type: ignore[import-not-found, unused-ignore]
    import torch

    meter.begin()
    config = {
        "train_batch_size": BATCH,
        "gradient_clipping": 0,
        "optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": 0.0}},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {**place, **buffers},
            "offload_optimizer": place,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 10_000_000,
            "stage3_prefetch_bucket_size": 5_000_000,
            "reduce_bucket_size": 5_000_000,
            "contiguous_gradients": False,
            **more,
        },
        "aio": {"block_size": 2**20, "queue_depth": 8, "intra_op_parallelism": 1, "single_submit": False, "overlap_events": True},
    }
    deepspeed.init_distributed(dist_backend="gloo", init_method=f"file://{job.folder / 'rendezvous'}", rank=0, world_size=1)
    torch.manual_seed(SEED)
    with deepspeed.zero.Init(config_dict_or_path=config, remote_device=place["device"]):
        model = build(job.depth)
    engine = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())[0]

    def step(x: "Tensor", y: "Tensor") -> float:
        loss = torch.nn.functional.cross_entropy(engine(x), y)
        engine.backward(loss)
        engine.step()
        return float(loss.item())

    return step


CONTENDERS: dict[str, tuple[str, Callable[[Job, StepMeter], "Step"], str]] = {
    "plain": ("plain PyTorch", plain, "torch"),
    "checkpointing": ("checkpointing + optimizer in backward", checkpointing, "torch"),
    "l2l": ("layer-to-layer-pytorch", layer_to_layer, "layer-to-layer-pytorch"),
    "zero-cpu": ("DeepSpeed ZeRO-3, CPU", deepspeed_cpu, "deepspeed"),
    "zero-nvme": ("DeepSpeed ZeRO-3, NVMe", deepspeed_nvme, "deepspeed"),
}


def contend(name: str, job: Job) -> None:
    """In a process of its own: train, and print JSON as the last line."""
    arrays = dict(np.load(job.folder / "batches.npz"))
    meter = StepMeter()
    package = CONTENDERS[name][2]
    try:
        step = CONTENDERS[name][1](job, meter)
        import torch

        losses = []
        meter.lap()
        for x, y in zip(torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]), strict=True):
            losses.append(step(x, y))
            meter.lap()
    except ModuleNotFoundError as error:
        print(json.dumps({"failed": f"not installed ({error}): pip install {package}"}))
        return
    # Whatever a rival raises is the reason why it has no figures, and is to be read in the table.
    except Exception as error:
        traceback.print_exc()
        reason = (str(error).strip() or "no text").splitlines()[0]
        print("\n" + json.dumps({"failed": f"{type(error).__name__}: {reason[:200]}"}), flush=True)
        return
    print("\n" + json.dumps({"losses": losses, "version": importlib.metadata.version(package), **meter.figures(skip=WARM_UP)}))


# -- the parent's side ----------------------------------------------------------------------------------------------------------------


def prepare(folder: Path, steps: int) -> None:
    """Write the data set as a file for ours, and as batches, in the order in which ours takes them, for the others."""
    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.seeds import permutation_of
    from lowmem_pnn.workload import open_data

    random = np.random.Generator(np.random.Philox(SEED))
    x = random.standard_normal((steps * BATCH, WIDTH), dtype=np.float32)
    y = random.integers(CLASSES, size=steps * BATCH)
    np.savez(folder / "data.npz", x_train=x, y_train=y)
    config = configure(
        max_gpu_mem="1TB", model=f"{__file__}:build", data=f"npz:{folder / 'data.npz'}", val_fraction=0.0, seed=SEED
    )
    split = open_data(config).splits["train"]
    batches = [split.batch(part) for part in permutation_of(len(split), SEED, "epoch", 0).reshape(steps, BATCH)]
    np.savez(folder / "batches.npz", x=np.stack([x.numpy() for x, _ in batches]), y=np.stack([y.numpy() for _, y in batches]))


def in_own_process(python: str, name: str, depth: int, folder: Path, clip: bool = False) -> dict[str, Any]:
    """A contender's figures, or {"failed": why}."""
    command = [python, __file__, "--contender", name, "--depths", str(depth), "--folder", str(folder)]
    try:
        return dict(last_json(run_process([*command, *(["--clip"] if clip else [])]).stdout))
    except RuntimeError as error:
        return {"failed": f"{str(error).rpartition(':')[2].strip()}; its own words are on stderr"}
    finally:
        shutil.rmtree(folder / "nvme", ignore_errors=True)
        (folder / "rendezvous").unlink(missing_ok=True)


def ours(depth: int, budget: str, folder: Path, imports_rss: int, clip: bool = False) -> dict[str, Any]:
    """A run of the command."""
    arguments = ["--method", "exact", "--max-gpu-mem", budget, "--model", f"{__file__}:build", "--model-arg", f"depth={depth}"]
    arguments += ["--data", f"npz:{folder / 'data.npz'}", "--val-fraction", "0", "--epochs", "1", "--batch-size", str(BATCH)]
    arguments += ["--micro-batch", str(BATCH), "--lr", str(LR), "--seed", str(SEED)]
    arguments += ["--clip-norm", str(CLIP)] if clip else []
    result, lines, process = fit(folder / "run", *arguments)
    shutil.rmtree(folder / "run")
    return {
        "losses": [line["loss"] for line in lines],
        "version": result["versions"].get("lowmem-pnn", "?"),
        **step_means(lines, WARM_UP),
        "peak_rss": process.peak_rss_bytes,
        "rss_above_imports": process.peak_rss_bytes - imports_rss,
        "private_above_imports": result["peak_bytes"],
        "result": result,
    }


def row_of(title: str, own: dict[str, Any], reference: dict[str, Any], parameters: int) -> tuple[str, ...]:
    """A contender's row; all cells but the first say nothing where it failed."""
    if "failed" in own:
        return (title, own["failed"], *["-"] * 8)
    known = "failed" not in reference
    far = max(abs(a - b) for a, b in zip(own["losses"], reference["losses"], strict=True)) if known else float("nan")

    def ratio(key: str) -> str:
        return f"{own[key] / reference[key]:.2f}" if known else "-"

    return (
        title,
        "yes" if far == 0 else f"to {far:.1e}",
        f"{own['peak_rss'] / MB:.0f}",
        f"{own['rss_above_imports'] / MB:.0f}",
        f"{own['private_above_imports'] / MB:.0f}",
        ratio("rss_above_imports"),
        f"{own['cpu_seconds']:.2f}",
        ratio("cpu_seconds"),
        f"{own['seconds']:.2f} ({ratio('seconds')})",
        f"{own['written'] / parameters:.1f}",
    )


HEADS = (
    "contender", "losses are plain's", "peak RSS MB", "above imports MB", "private above imports MB", "ratio", "CPU s/step", "ratio",
    "wall s/step (ratio)", "written B/param/step",
)  # fmt: skip


def cpu_verdict(what: str, own: dict[str, Any], reference: dict[str, Any], quickest: float) -> str:
    """The goal's line, by the quickest of plain PyTorch's runs at this depth, with the ratio to its own rival beside it."""
    ratio, of_own = own["cpu_seconds"] / quickest, own["cpu_seconds"] / reference["cpu_seconds"]
    beside = "" if ratio == of_own else f" ({of_own:.2f} of the run beside it; one run of each)"
    return verdict(f"{what} at most {GOAL_CPU} of plain's", f"{ratio:.2f} of its quickest run{beside}", ratio <= GOAL_CPU)


def verdict(goal: str, found: str, met: bool) -> str:
    """A goal's line."""
    return f"- {goal}: {found}, {'met' if met else 'NOT MET'}"


def main() -> None:
    """Run all contenders and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--depths", default="24,48", help="all contenders at the first, plain and ours at the others")
    parser.add_argument("--budget", default="280MB")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="OMP_NUM_THREADS of everybody; with more, threads that wait for one another burn CPU seconds where the machine is busy",
    )
    parser.add_argument("--rivals-python", default=sys.executable, help="an interpreter that has the rivals' packages")
    parser.add_argument("--only", help=f"of {', '.join([*CONTENDERS, 'ours', 'clipping'])}; plain is always run; writes no page")
    parser.add_argument("--quick", action="store_true", help="a few steps of small models; writes no page")
    for hidden in ("--contender", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--clip", "--prepare"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.steps, arguments.depths = 4, "2,4"
    depths = [int(depth) for depth in arguments.depths.split(",")]
    if arguments.prepare:
        prepare(Path(arguments.folder), arguments.steps)
        return
    if arguments.contender:
        contend(arguments.contender, Job(depths[0], arguments.clip, Path(arguments.folder)))
        return
    if arguments.steps <= WARM_UP:
        parser.error(f"--steps {arguments.steps} leaves nothing to measure after {WARM_UP}; give more")
    chosen = arguments.only.split(",") if arguments.only else [*CONTENDERS, "ours", "clipping"]
    if unknown := set(chosen) - {*CONTENDERS, "ours", "clipping"}:
        parser.error(f"--only {','.join(unknown)} is no contender; give some of {', '.join([*CONTENDERS, 'ours', 'clipping'])}")

    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_process([sys.executable, __file__, "--prepare", "--folder", name, "--steps", str(arguments.steps)])
        imports_rss = int(run_process([sys.executable, "-c", IMPORTS]).stdout) * 1024
        data, rows = [], []

        def add(depth: int, key: str, title: str, own: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
            data.append({"depth": depth, "contender": key, **own})
            title = f"{title} {own.get('version', '')}".strip() + (f", depth {depth}" if depth != depths[0] else "")
            rows.append(row_of(title, own, reference, num_parameters(depth)))
            print(*rows[-1], sep="\t", file=sys.stderr, flush=True)
            return own

        reached: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        for depth in depths:
            reference = in_own_process(sys.executable, "plain", depth, folder)
            add(depth, "plain", "plain PyTorch", reference, reference)
            for key, (title, _, _) in CONTENDERS.items() if depth == depths[0] else ():
                if key != "plain" and key in chosen:
                    python = sys.executable if CONTENDERS[key][2] == "torch" else arguments.rivals_python
                    add(depth, key, title, in_own_process(python, key, depth, folder), reference)
            if "ours" in chosen:
                own = ours(depth, arguments.budget, folder, imports_rss)
                reached[f"depth {depth}"] = (add(depth, "ours", "ours", own, reference), reference)
            if "clipping" in chosen and depth == depths[0]:
                clipped = in_own_process(sys.executable, "plain", depth, folder, clip=True)
                add(depth, "plain, clipping", "plain PyTorch, clipping", clipped, clipped)
                own = ours(depth, arguments.budget, folder, imports_rss, clip=True)
                reached["clipping"] = (add(depth, "ours, clipping", "ours, clipping", own, clipped), clipped)

    lines = []
    # Clipping does more than the same without: where that took less, the machine was slower then, and its figure says too little.
    plain_ones = [reference for _, reference in reached.values() if "cpu_seconds" in reference]
    quickest = min((one["cpu_seconds"] for one in plain_ones[: 1 + ("clipping" in reached)]), default=0.0)
    if f"depth {depths[0]}" in reached:
        own, reference = reached[f"depth {depths[0]}"]
        written = own["written"] / num_parameters(depths[0])
        same = own["losses"] == reference["losses"]
        lines += [
            verdict("losses are plain PyTorch's, bit for bit", str(same), same),
            verdict(
                f"peak at most {GOAL_PEAK / MB:.0f} MB above the import floor",
                f"private {own['private_above_imports'] / MB:.0f} MB, RSS {own['rss_above_imports'] / MB:.0f} MB",
                max(own["private_above_imports"], own["rss_above_imports"]) <= GOAL_PEAK,
            ),
            cpu_verdict("CPU seconds of a step", own, reference, quickest),
            verdict(f"at most {GOAL_WRITTEN} bytes written a parameter and step", f"{written:.2f}", written <= GOAL_WRITTEN),
        ]
    if "clipping" in reached:
        own, reference = reached["clipping"]
        written = own["written"] / num_parameters(depths[0])
        same = own["losses"] == reference["losses"]
        lines += [
            verdict(f"with gradients clipped at most {GOAL_WRITTEN_CLIPPED}", f"{written:.2f}", written <= GOAL_WRITTEN_CLIPPED),
            cpu_verdict("with gradients clipped, CPU seconds of a step", own, reference, quickest),
            verdict("with gradients clipped, losses are plain PyTorch's", str(same), same),
        ]
    for depth in depths[1:]:
        if f"depth {depth}" in reached:
            first, last = reached[f"depth {depths[0]}"][0], reached[f"depth {depth}"][0]
            growth = [last[key] / first[key] - 1 for key in ("private_above_imports", "rss_above_imports")]
            lines.append(
                verdict(
                    f"from depth {depths[0]} to {depth} the peak grows by at most {GOAL_GROWTH:.0%}",
                    f"private {growth[0]:+.1%}, RSS {growth[1]:+.1%}",
                    max(growth) <= GOAL_GROWTH,
                )
            )
    text = "\n".join(
        [
            f"{depths[0]} x [Linear {WIDTH}, LayerNorm, ReLU] and a head, {num_parameters(depths[0]) / 1e6:.1f} M parameters, training state "
            f"{num_parameters(depths[0]) * 16 / MB:.0f} MB; AdamW, batch {BATCH}, float32, {arguments.steps} steps of which the first "
            f"{WARM_UP} are not counted; {arguments.threads} compute thread(s) each; budget of ours {arguments.budget}.",
            "Ratios are to plain PyTorch. The import floor is what a process holds once it has imported what it needs; *private* memory is",
            "without files' pages (sampled; ours: its own meter, above its own floor), RSS with them (the kernel's own peak).",
            "",
            markdown_table(HEADS, rows),
            "",
            *lines,
        ]
    )
    if arguments.only or arguments.quick:
        print(text)
        return
    write_results(
        "larger_than_memory", "Larger than memory, exactly: ours and others", text, {"steps": arguments.steps, "contenders": data}
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
