"""Which families of transformers are cut at their blocks, train by `exact` to the bit, and in a quarter of plain PyTorch's memory?

A small model of each family, built here and as its constructor gives it (six blocks of width 128; 64 tokens, or images of 64x64; batch
16, or 48 for peaks; AdamW; CPU): into how many layers it is cut; whether outputs and gradients of
the layers have the bits of the model's, in train and in eval mode; and, of four families (--full: of all), whether one step of `exact`, a
partition for every layer, gives the weights of plain PyTorch's, and `fit --method exact` in 1/4 of plain PyTorch's peak. Everything in a
process of its own.

    python bench/hf_coverage.py [--quick] [--full] [--names Llama,BERT] [--again] [--known]

Needs transformers. A quarter of an hour on two cores, an hour with --full; --quick takes four families. What is measured is kept in
bench/.cache/, and --known makes the page of that alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import Cache, markdown_table, run_process, write_results
from hf_models import FAMILIES, builder_of, data_of

BATCH, SEED, LR = 16, 0, 1e-3
# Of so small a model the kernels' own memory and the reserve are a fourth of what plain PyTorch takes of 16 samples.
MEASURED_BATCH = 48
# A layer with more than so many times the weights of the largest block holds parts of several.
MOST_OF_A_BLOCK = 1.3
MB = 1e6
QUICK = ("GPT-2", "Llama", "BERT", "ViT")


def flat(inputs: Any) -> tuple[Any, ...]:
    """Return the tensors of a batch of samples."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def loss_of(scores: Any, y: Any) -> Any:
    """Return the mean cross-entropy over samples, or over tokens."""
    import torch

    return torch.nn.functional.cross_entropy(scores.flatten(0, -2), y.flatten())


def plain(name: str) -> dict[str, Any]:
    """Take two steps of plain PyTorch and return their peak of private memory above imports."""
    import torch
    import transformers  # noqa: F401 - before the memory is measured

    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.device import CpuDevice

    config = configure(max_gpu_mem="1TB", model="mlp:1-1-1", data="digits")
    x, y = data_of(name, 2 * MEASURED_BATCH)
    builder_of(name)()
    with CpuDevice(config.max_gpu_mem) as device:
        model = builder_of(name)().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
        for step in range(2):
            part = slice(step * MEASURED_BATCH, step * MEASURED_BATCH + MEASURED_BATCH)
            loss_of(model(*(tensor[part] for tensor in flat(x))), y[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"peak": device.peak_bytes}


def structure(name: str) -> dict[str, Any]:
    """Cut a model, and hold its layers against the model itself: bits of outputs and gradients."""
    import torch

    from lowmem_pnn.capture.capture import capture
    from lowmem_pnn.model.chain import TensorSpec

    torch.manual_seed(SEED)
    model = builder_of(name)()
    x, y = data_of(name, 7)
    chain = capture(model, tuple(TensorSpec(tuple(tensor.shape[1:]), tensor.dtype) for tensor in flat(x)))
    differing = []
    for batch in (1, 2, 7):
        for training in (True, False):
            found = []
            for run in (model.train(training), chain.train(training)):
                torch.manual_seed(SEED)
                scores = run(*(tensor[:batch] for tensor in flat(x)))
                loss_of(scores, y[:batch]).backward()
                found.append((scores, {key: parameter.grad for key, parameter in model.named_parameters()}))
                model.zero_grad()
            (theirs, their_gradients), (ours, our_gradients) = found
            pairs = [(theirs, ours), *((gradient, our_gradients[key]) for key, gradient in their_gradients.items())]
            same = all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
            if not same:
                differing.append(f"batch {batch}, {'train' if training else 'eval'} mode")
    sizes = [sum(parameter.numel() for parameter in layer.parameters().values()) for layer in chain.layers]
    return {
        "layers": len(chain.layers),
        "largest": max(sizes) / sum(sizes),
        "tensors": max(len(specs) for specs in chain.boundaries[1:-1]) if len(chain.layers) > 1 else 0,
        "whole": [f"{layer.name} {layer.whole}" for layer in chain.layers if layer.whole],
        "differing": differing,
    }


def step(name: str) -> dict[str, Any]:
    """Take one step by `exact`, a partition for every layer, and hold it against plain PyTorch's."""
    import torch
    from safetensors.torch import load_file

    import lowmem_pnn
    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.seeds import permutation_of, seed_of
    from lowmem_pnn.sources.datasets import make_dataset
    from lowmem_pnn.workload.parts import split_data

    x, y = data_of(name, BATCH)
    layers = structure(name)["layers"]
    with tempfile.TemporaryDirectory() as folder:
        result = lowmem_pnn.fit(
            builder_of(name), (x, y), method="exact", max_gpu_mem="12GB", device="cpu", batch_size=BATCH, micro_batch=BATCH, epochs=1, lr=LR,
            seed=SEED, val_fraction=0.0, cuts=",".join(map(str, range(1, layers))) or None, workdir=f"{folder}/run",
        )  # fmt: skip
        ours = load_file(result.weights_file)
    config = configure(max_gpu_mem="12GB", model="python:model", data="python:data", val_fraction=0.0, seed=SEED)
    train = split_data(make_dataset((x, y), name="data"), config)[1]["train"]
    samples, labels = train.batch(permutation_of(BATCH, SEED, "epoch", 0))
    torch.manual_seed(SEED)
    model = builder_of(name)().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    torch.manual_seed(seed_of(SEED, "forward", 0, 0, 0))
    loss_of(model(*flat(samples)), labels).backward()
    optimizer.step()
    theirs = {key: tensor for key, tensor in model.state_dict().items() if key in ours}
    return {
        "equal": all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items()),
        "largest_difference": max(float((tensor.double() - ours[key].double()).abs().max()) for key, tensor in theirs.items()),
    }


def fit(name: str, budget: int) -> dict[str, Any]:
    """Train two batches within a budget."""
    import lowmem_pnn
    from lowmem_pnn.errors import BudgetError

    with tempfile.TemporaryDirectory() as folder:
        try:
            result = lowmem_pnn.fit(
                builder_of(name), data_of(name, 2 * MEASURED_BATCH), method="exact", max_gpu_mem=str(budget), device="cpu",
                batch_size=MEASURED_BATCH, epochs=1, val_fraction=0.0, workdir=f"{folder}/run",
            )  # fmt: skip
        except BudgetError as error:
            return {"refused": str(error)}
    return {"predicted": result.predicted_peak_bytes, "peak": result.peak_bytes, "partitions": len(result.partitions)}


def measure(name: str, full: bool, cache: Cache, known: bool) -> dict[str, Any]:
    """Measure a family, each figure in a process of its own: its layers alone, or steps and peaks too; or take what is known of it.

    Each figure is kept as it comes: a bench that was stopped goes on where it was.
    """
    if known:
        kinds = ("structure", "step", "plain", "fit")
        return {
            kind: cache.get({"name": name, "kind": kind}, dict) for kind in kinds if cache.knows({"name": name, "kind": kind})
        }

    def work(kind: str, value: int = 0) -> dict[str, Any]:
        def run() -> dict[str, Any]:
            try:
                done = run_process([sys.executable, __file__, "--work", name, kind, str(value)])
            except RuntimeError as error:
                return {"failed": str(error)}
            found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
            return found

        return cache.get({"name": name, "kind": kind}, run)

    found = {"structure": work("structure")}
    if full:
        found.update(step=work("step"), plain=work("plain"))
        found["fit"] = work("fit", found["plain"]["peak"] // 4)
    return found


def largest_piece(name: str) -> float:
    """Return the share of the weights that the largest block of a family has, or the largest module outside of blocks."""
    import torch
    from torch import nn

    def is_chain(module: Any) -> bool:
        return isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1

    with torch.device("meta"):
        model = builder_of(name)()
    blocks = [child for chain in filter(is_chain, model.modules()) for child in chain if not any(map(is_chain, child.modules()))]
    leaves = [module for module in model.modules() if not any(module.children())]
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (*blocks, *leaves)]
    return float(max(sizes) / sum(parameter.numel() for parameter in model.parameters()))


def row_of(name: str, found: dict[str, Any]) -> tuple[list[str], dict[str, bool]]:
    """Return a family's line, and what is counted of it."""
    family, cut, step_found, fitted = FAMILIES[name], found["structure"], found.get("step"), found.get("fit")
    layers = cut.get("layers", 0)
    captured = layers >= family.blocks and cut["largest"] < MOST_OF_A_BLOCK * largest_piece(name)
    why = "" if captured else family.reason or "; ".join(cut.get("whole", [])) or cut.get("failed", "")
    equal = not cut.get("differing", ["failed"])
    cells = [
        name, str(family.blocks), str(layers or "-"), "yes" if captured else f"no: {why}",
        f"{cut['largest']:.0%}" if layers else "-", str(cut.get("tensors", "-")), "yes" if equal else "no",
    ]  # fmt: skip
    counted = {"captured": captured, "equal": equal}
    exact = "-"
    if step_found is not None:
        failed = f"to {step_found['largest_difference']:.0e}" if "equal" in step_found else "no"
        exact, counted["step"] = "yes" if step_found.get("equal") else failed, bool(step_found.get("equal"))
    if fitted is None or "plain" not in found:
        return [*cells, exact, "-", "-", "-"], counted
    peak, fits = found["plain"]["peak"], "peak" in fitted
    counted |= {"quarter": fits, "over": fits and fitted["peak"] * 4 > peak}
    share = f"{fitted['peak'] / peak:.2f}" if fits else "no"
    return [*cells, exact, f"{peak / MB:.0f}", share, f"{fitted['predicted'] / fitted['peak']:.2f}" if fits else "-"], counted


def main() -> None:
    """Measure the families and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="four families; writes no page")
    parser.add_argument("--full", action="store_true", help="steps and peaks of all families")
    parser.add_argument("--names", help="comma list of families; writes no page")
    parser.add_argument("--again", action="store_true", help="forget what was measured before")
    parser.add_argument("--known", action="store_true", help="measure nothing: the page of what is kept")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        name, kind, value = arguments.work
        works: dict[str, Any] = {"structure": structure, "step": step, "plain": plain}
        print(json.dumps(fit(name, int(value)) if kind == "fit" else works[kind](name)))
        return
    names = arguments.names.split(",") if arguments.names else QUICK if arguments.quick else tuple(FAMILIES)
    cache = Cache("hf_coverage", arguments.again)
    rows, counts, data = [], [], []
    for name in names:
        try:
            if arguments.known and not cache.knows({"name": name, "kind": "structure"}):
                continue
            full = arguments.full or name in QUICK or cache.knows({"name": name, "kind": "fit"})
            found = measure(name, full, cache, arguments.known)
        except (RuntimeError, KeyError, subprocess.SubprocessError) as error:
            print(f"{name}: {error!r}", file=sys.stderr, flush=True)
            continue
        cells, counted = row_of(name, found)
        rows.append(cells)
        counts.append(counted)
        data.append({"name": name, **found})
        print(*cells, sep="\t", file=sys.stderr, flush=True)

    def count(key: str) -> str:
        own = [entry[key] for entry in counts if key in entry]
        return f"{sum(own)} of {len(own)}"

    heads = (
        "family", "blocks", "layers", "cut at its blocks", "largest layer", "tensors at a cut", "bits of the model", "bits of a step",
        "plain MB", "peak in 1/4", "predicted / measured",
    )  # fmt: skip
    text = "\n".join(
        [
            f"Batch {BATCH} ({MEASURED_BATCH} for peaks), AdamW, CPU. `cut at its blocks`: there are as many layers as blocks, and none",
            f"has {MOST_OF_A_BLOCK} times the weights of the largest block. `bits of the model`: outputs and gradients of the layers beside",
            "the model's, for 1, 2, and 7 samples, in train and eval mode. `bits of a step`: weights after one step of `exact`, a",
            "partition for every layer, beside plain PyTorch's. `peak in 1/4`: the measured peak of two steps of `exact` in a quarter of",
            "plain PyTorch's peak, as a share of it (in micro-batches as planned).",
            "",
            markdown_table(heads, rows),
            "",
            f"- cut at their blocks: {count('captured')}",
            f"- bits of the model: {count('equal')}",
            f"- bits of a step: {count('step')}",
            f"- train in a quarter of plain PyTorch's peak: {count('quarter')}; peaks above it: {count('over')}",
        ]
    )
    write_results(
        "hf_coverage",
        "Models of transformers, block by block",
        text,
        {"families": data},
        write=not (arguments.quick or arguments.names),
        machines=cache.machines,
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
