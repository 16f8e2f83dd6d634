"""What holds on a GPU, in at most eight minutes: the budget as a wall, exact as plain PyTorch, copies beside computing, and what it costs.

Each case is a process of its own, with a limit in seconds; meanwhile this one polls the device's memory from outside, through NVML. First
`fit` as one types it, in 2 GB. Then `exact` beside a plain loop, both deterministic, bit by bit; what share of the copies goes on beside
kernels, and through page-locked memory, in a trace. Then a GPT of 85 M parameters and a ResNet-50: plain PyTorch with everything on the device,
the same with activation checkpointing, and `exact` at 1/2, 1/4 and 1/8 of the memory that plain PyTorch's allocator held, beside the context.
`neuroflux` in a quarter, beside backprop with the small batch that fits there, as in NeuroFlux's figures (2.3 to 6.1 times as fast).
At last the tests that are marked `gpu`.

    python bench/gpu.py [--folder DIR] [--quick] [--dry]

The page is bench/results/gpu.md, with a description of the machine. A case that fails, or in which more was held than its budget, makes the
exit code 1. `--quick` leaves out ResNet-50, most budgets, the trace and the tests. `--dry` tries the bench itself, without a GPU: toys on
the CPU, `exact` and `neuroflux` on a simulated device; it prints the table, and writes nothing.
"""

import argparse
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from common import markdown_table, write_results

MB = 10**6
ROOT = Path(__file__).resolve().parents[1]
BUDGET = 2_000 * MB
# The simulated device counts the model while the host builds it: no toy is in an eighth.
FRACTIONS = ((2, 4, 8), (2, 3, 4))
TOTAL_SECONDS, CASE_SECONDS = 470, 60
# A dry run may be one of several things that a machine does.
DRY_SECONDS = 1200
# What a context is taken to hold where the driver does not tell.
CONTEXT_MB = 600.0
PAPER = "2.3 to 6.1"
TESTS = [
    "-m",
    "pytest",
    "tests/system/test_gpu.py",
    "-m",
    "gpu",
    "-q",
    "-p",
    "no:cacheprovider",
    "-o",
    "addopts=--import-mode=importlib",
]
# Imported once, by the process that the cases are forked from; it never touches the device.
PRELOADED = ["torch._dynamo", "torch._subclasses.fake_tensor", "lowmem_pnn.api", "lowmem_pnn.zoo.models"]


@dataclass(frozen=True)
class Load:
    """What is trained.

    Args:
        model: as `--model` takes it, and for a dry run.
        side: pixels of an image, or tokens of a sample; and in a dry run.
        batch: samples of a step; and in a dry run.
    """

    model: tuple[str, str]
    side: tuple[int, int]
    batch: tuple[int, int]


LOADS = {
    "gpt": Load(("gpt:layers=12,width=768,heads=12,context=256", "gpt:layers=8,width=64,heads=2,context=32"), (256, 32), (16, 8)),
    "resnet50": Load(("resnet50", "cifar-mobilenetv2"), (128, 32), (64, 8)),
    "resnet18": Load(("cifar-resnet18", "bench/networks.py:resnet"), (32, 32), (128, 64)),
}


@dataclass(frozen=True)
class Setting:
    """How the cases run.

    Args:
        dry: on the CPU, with toys.
        quick: fewer cases.
        folder: where the runs' files go.
    """

    dry: bool
    quick: bool
    folder: str

    @property
    def device(self) -> str:
        """As torch calls it."""
        return "cpu" if self.dry else "cuda"

    def of(self, pair: Sequence[Any]) -> Any:
        """The one of two that this setting takes."""
        return pair[self.dry]


# What a case does, in a process of its own: each returns its figures.


def data(setting: Setting, kind: str, samples: int) -> tuple[Any, Any]:
    """Random samples and their targets."""
    import torch

    generator, side = torch.Generator().manual_seed(0), setting.of(LOADS[kind].side)
    if kind == "gpt":
        tokens = torch.randint(0, 256, (samples, side + 1), generator=generator)
        tokens[0, :2] = 255  # the largest number is in it, whatever was drawn
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return torch.rand(samples, 3, side, side, generator=generator), torch.arange(samples) % 10


def build(setting: Setting, kind: str) -> Callable[[], Any]:
    """The function that makes the model."""
    from lowmem_pnn.zoo.models import find_model

    spec: str = setting.of(LOADS[kind].model)
    arguments = {"depth": 8, "width": 8} if ".py:" in spec else {}
    if setting.dry and setting.quick:
        spec = spec.replace("layers=8", "layers=3")
    return find_model(spec, arguments, 256 if kind == "gpt" else 10).build


def plain(setting: Setting, kind: str, steps: int, checkpointed: bool = False) -> dict[str, Any]:
    """Plain PyTorch, with everything on the device: samples per second, and the memory that its allocator held."""
    import torch
    from torch.utils.checkpoint import checkpoint

    from lowmem_pnn.capture.capture import capture
    from lowmem_pnn.device import SimulatedDevice
    from lowmem_pnn.model.chain import TensorSpec

    batch = setting.of(LOADS[kind].batch)
    simulated = SimulatedDevice(10**12) if setting.dry else None
    if simulated is not None:
        simulated.open()  # counts what lives
    x, y = (tensor.to(setting.device) for tensor in data(setting, kind, batch))
    model = build(setting, kind)().to(setting.device).train()
    layers = capture(model, TensorSpec(tuple(x.shape[1:]), x.dtype)).layers if checkpointed else ()
    size = max(1, math.isqrt(len(layers)))
    segments = [layers[begin : begin + size] for begin in range(0, len(layers), size)]

    def run(part: Sequence[Any], *tensors: Any) -> tuple[Any, ...]:
        for layer in part:
            tensors = layer(*tensors)
        return tensors

    def forward() -> Any:
        tensors: tuple[Any, ...] = (x,)
        for part in segments:
            tensors = checkpoint(run, part, *tensors, use_reentrant=False)
        return tensors[0] if segments else model(x)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    began = ended = 0.0
    for step in range(steps + 2):
        loss = torch.nn.functional.cross_entropy(forward().flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in (1, steps + 1):
            float(loss.detach())
            began, ended = (time.perf_counter(), 0.0) if step == 1 else (began, time.perf_counter())
    held = torch.cuda.max_memory_reserved() if simulated is None else simulated.section_peak_bytes()
    if simulated is not None:
        simulated.close()
    return {"samples_per_second": steps * batch / (ended - began), "allocator_mb": held / MB}


def ours(
    setting: Setting, kind: str, method: str, budget_mb: float, batch: int | str, steps: int, **options: Any
) -> dict[str, Any]:
    """A run of ours: samples per second of its second epoch, or epochs, and peaks."""
    import lowmem_pnn
    from lowmem_pnn.device import SimulatedDevice
    from lowmem_pnn.training import setup

    if setting.dry:
        setup._device_of = lambda config, rank: SimulatedDevice(config.max_gpu_mem)
        options["compare"] = False  # it runs the whole model on the host, which counts there
    samples = (setting.of(LOADS[kind].batch) if batch == "auto" else int(batch)) * steps
    workdir = Path(setting.folder) / "run"
    result = lowmem_pnn.fit(
        build(setting, kind), data(setting, kind, samples), max_gpu_mem=int(budget_mb * MB), method=method, device=setting.device,
        workdir=workdir, overwrite=True, epochs=2, batch_size=batch, val_fraction=0, commit_every=10000, lr=1e-4, verbose=False, **options,
    )  # fmt: skip
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rates = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    # Blocks learn one after the other, two epochs each.
    seconds = sum(1 / rate for rate in rates[1::2]) if method == "neuroflux" else 1 / rates[-1]
    return {
        "samples_per_second": 1 / seconds,
        "peak_mb": result.peak_bytes / MB,
        "predicted_mb": result.predicted_peak_bytes / MB,
        "budget_mb": budget_mb,
        "micro_batches": sorted({part["micro_batch"] for part in result.partitions}),
        "partitions": len(result.partitions),
        "retries": result.oom_retries,
        "context": dict(result.context),
        "waiting": lines[-1].get("waiting"),
    }


def same_as_plain(setting: Setting, clip_norm: float | None = None) -> dict[str, Any]:
    """`exact` in four partitions beside a plain loop, with BatchNorm and dropout, both deterministic; with gradients clipped, or not."""
    import torch
    from safetensors.torch import load_file
    from torch import nn

    import lowmem_pnn
    from lowmem_pnn.config.configure import configure
    from lowmem_pnn.device import SimulatedDevice
    from lowmem_pnn.seeds import permutation_of, seed_of
    from lowmem_pnn.sources.datasets import make_dataset
    from lowmem_pnn.training import setup
    from lowmem_pnn.workload.inputs import split_data

    if setting.dry:
        setup._device_of = lambda config, rank: SimulatedDevice(config.max_gpu_mem)
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.2),
            nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(12 * 256, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10),
        )  # fmt: skip

    given = data(Setting(True, True, ""), "resnet18", 64)
    options: dict[str, Any] = {
        "val_fraction": 0,
        "epochs": 2,
        "batch_size": 16,
        "lr": 1e-3,
        "optimizer": "adamw",
        "clip_norm": clip_norm,
    }
    result = lowmem_pnn.fit(
        make, given, max_gpu_mem=BUDGET, device=setting.device, method="exact", cuts="1,2,3",
        workdir=Path(setting.folder) / "run", overwrite=True, verbose=False, **options,
    )  # fmt: skip
    config = configure(max_gpu_mem=BUDGET, model="python:model", data="python:data", **options)
    split = split_data(make_dataset(given, name="data"), config)[1]["train"]
    torch.manual_seed(0)
    model = make().to(setting.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    for step in range(8):
        order = permutation_of(64, 0, "epoch", step // 4)[16 * (step % 4) : 16 * (step % 4) + 16]
        x, y = (tensor.to(setting.device) for tensor in split.batch(order))
        torch.manual_seed(seed_of(0, "forward", 0, step, 0))
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    trained = load_file(result.weights_file)
    pairs = [(own.cpu(), trained[name]) for name, own in model.state_dict().items()]
    worst = max(float((own.double() - other.double()).abs().max()) for own, other in pairs)
    return {"bit_equal": all(torch.equal(own, other) for own, other in pairs), "largest_difference": worst}


def overlap(setting: Setting) -> dict[str, Any]:
    """Share of the copies' time that kernels ran beside, share of their bytes from page-locked memory, GB/s; by direction."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU if setting.dry else ProfilerActivity.CUDA]) as trace:
        batch = setting.of(LOADS["gpt"].batch)
        ours(setting, "gpt", "exact", 8 if setting.dry else 1500, batch, 3, partitions=3)
    file = Path(setting.folder) / "trace.json"
    trace.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    kernels = sorted((one["ts"], one["ts"] + one["dur"]) for one in events if one.get("cat") == "kernel")
    found: dict[str, Any] = {"kernels": len(kernels)}
    for way in ("HtoD", "DtoH"):
        copies = [one for one in events if one.get("cat") == "gpu_memcpy" and way in one["name"] and one["dur"] > 20]
        total, moved = sum(one["dur"] for one in copies), sum(one["args"]["bytes"] for one in copies)
        if not copies or not moved:
            found[way] = "none seen"
            continue
        beside = sum(_shared(one["ts"], one["ts"] + one["dur"], kernels) for one in copies)
        locked = sum(one["args"]["bytes"] for one in copies if "Pinned" in one["name"])
        found[way] = (
            f"{len(copies)} copies, {beside / total:.0%} beside kernels, {locked / moved:.0%} page-locked, {moved / total / 1e3:.1f} GB/s"
        )
    return found


def _shared(begin: float, end: float, spans: Sequence[tuple[float, float]]) -> float:
    """How much of a span others cover; those of one stream do not overlap each other."""
    return min(end - begin, sum(max(0.0, min(end, stop) - max(begin, start)) for start, stop in spans))


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "plain": plain,
    "ours": ours,
    "same_as_plain": same_as_plain,
    "overlap": overlap,
}


def answer(to: Connection, key: str, setting: Setting, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Run a case in this process, which was made for it, and send its figures, or why there are none."""
    os.chdir(ROOT)
    try:
        found = CASES[key](setting, *arguments, **named)
    except Exception as error:  # whatever a case raises is its failure
        found = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    to.send({**found, "cpu_seconds": round(time.process_time(), 1)})


# The process that runs them.


@dataclass
class Row:
    """A line of the table.

    Args:
        name: of the case.
        found: its figures; `error` where it failed.
        budget_mb: what it may hold; None for as much as it likes.
        rival: samples per second that its own stand beside.
    """

    name: str
    found: dict[str, Any]
    budget_mb: float | None = None
    rival: float | None = None
    faults: list[str] = field(default_factory=list)

    def judge(self) -> None:
        """Find what is wrong."""
        if "error" in self.found:
            self.faults.append(self.found["error"])
        if self.found.get("bit_equal") is False:
            self.faults.append(f"not bit-equal: {self.found['largest_difference']:.3g}")
        for key in ("peak_mb", "outside_mb"):
            if self.budget_mb is not None and (self.found.get(key) or 0.0) > self.budget_mb:
                self.faults.append(f"{self.found[key]:,.0f} MB held")

    def cells(self) -> list[str]:
        """The cells of the table."""
        speed, found = self.found.get("samples_per_second"), self.found
        told = [f"{key} {found[key]}" for key in ("HtoD", "DtoH", "micro_batches", "partitions") if key in found]
        told.append(found.get("said", ""))
        if "bit_equal" in found:
            told.append("bit-equal" if found["bit_equal"] else "")
        return [
            self.name, *(number(found.get(key), ",.0f") for key in ("outside_mb", "peak_mb", "allocator_mb")),
            number(self.budget_mb, ",.0f"), number(speed, ",.1f"), number(self.rival, ",.1f"),
            number(speed / self.rival if speed and self.rival else None, ".2f"),
            f"FAILED: {'; '.join(self.faults)}" if self.faults else "; ".join(one for one in told if one),
        ]  # fmt: skip


HEADS = ["case", "device MB, from outside", "peak MB", "allocator MB", "budget MB", "samples/s", "rival's", "ratio", "also"]


def number(value: float | None, form: str) -> str:
    """A figure, or a dash."""
    return "-" if value is None or value != value else format(value, form)


class Bench:
    """Runs cases, one after the other, as long as there is time.

    Args:
        setting: how they run.
    """

    def __init__(self, setting: Setting) -> None:
        self.rows: list[Row] = []
        self._setting = setting
        self._began = time.monotonic()
        self._nvml = None
        self._fork = multiprocessing.get_context("forkserver")
        self._fork.set_forkserver_preload(PRELOADED)
        if not setting.dry:
            from lowmem_pnn.memory.nvml import Nvml

            self._nvml = Nvml.find(0)

    def case(
        self, name: str, key: str, *arguments: Any, budget_mb: float | None = None, rival: float | None = None, **named: Any
    ) -> dict[str, Any]:
        """Run a case, and return its figures."""

        def run(limit: float) -> dict[str, Any]:
            own, childs = self._fork.Pipe()
            process = self._fork.Process(target=answer, args=(childs, key, self._setting, arguments, named))
            process.start()
            childs.close()
            try:
                if own.poll(limit):
                    found = dict(own.recv())
                    process.join(10)
                    return found
                return {"error": f"no end in {limit:.0f} s"}
            except EOFError:
                process.join()
                return {"error": f"exit code {process.exitcode}"}
            finally:
                process.kill()
                process.join()

        return self._run(name, run, DRY_SECONDS if self._setting.dry else CASE_SECONDS, budget_mb, rival)

    def command(self, name: str, line: Sequence[str], limit: float, budget_mb: float | None = None) -> dict[str, Any]:
        """Run a command line: a code other than 0 is a failure."""

        def run(limit: float) -> dict[str, Any]:
            process = subprocess.Popen(
                line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, start_new_session=True
            )
            try:
                text, _ = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return {"error": f"no end in {limit:.0f} s"}
            words = " ".join((text.strip().splitlines() or [""])[-1].split())
            return {"said": words} if process.returncode == 0 else {"error": f"exit code {process.returncode}: {words}"}

        return self._run(name, run, limit, budget_mb, None)

    def _run(
        self,
        name: str,
        run: Callable[[float], dict[str, Any]],
        limit: float,
        budget_mb: float | None,
        rival: float | None,
    ) -> dict[str, Any]:
        left = (DRY_SECONDS if self._setting.dry else TOTAL_SECONDS) - (time.monotonic() - self._began)
        found = self._watched(lambda: run(min(limit, left))) if left > 8 else {"error": "no time was left"}
        row = Row(name, found, budget_mb, rival)
        row.judge()
        self.rows.append(row)
        print(
            f"{name}: {'; '.join(row.faults) or 'holds'}, {found.get('cpu_seconds', '-')} s of CPU", file=sys.stderr, flush=True
        )
        return found

    def _watched(self, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Poll the device's memory while something runs."""
        before, highest, over = self._used(), [0], threading.Event()

        def watch() -> None:
            while not over.wait(0.005):
                highest[0] = max(highest[0], self._used() or 0)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            found = run()
        finally:
            over.set()
            watcher.join()
        return found if before is None else {**found, "outside_mb": (highest[0] - before) / MB}

    def _used(self) -> int | None:
        return None if self._nvml is None else self._nvml.used_bytes()


def run_all(bench: Bench, setting: Setting) -> None:
    """All cases."""
    toy = ["--model", "mlp:64-32-10", "--data", "digits", "--epochs", "1"]
    # Where a dry run has no GPU, the same command on the CPU.
    what = toy if setting.dry else ["--model", "mlp:64-2048-2048-2048-10", "--data", "digits", "--epochs", "3"]
    fit = [sys.executable, "-m", "lowmem_pnn", "fit", "--max-gpu-mem", str(BUDGET), "--device", setting.device, *what]
    fit += ["--workdir", str(Path(setting.folder) / "command"), "--overwrite", "--quiet", "--no-report"]
    bench.command("fit --max-gpu-mem 2GB", fit, 80, BUDGET / MB)
    bench.case("exact, as plain PyTorch", "same_as_plain")
    if not (setting.dry and setting.quick):
        bench.case("exact, as plain PyTorch, clipped", "same_as_plain", clip_norm=0.1)
    if not setting.quick:
        bench.case("copies of exact", "overlap")
    for kind in ("gpt",) if setting.quick else ("gpt", "resnet50"):
        batch, steps = setting.of(LOADS[kind].batch), setting.of((8, 2))
        whole = bench.case(f"{kind}, plain", "plain", kind, steps)
        speed, allocator = whole.get("samples_per_second"), whole.get("allocator_mb", math.nan)
        context = 0.0 if setting.dry else max(0.0, whole.get("outside_mb", allocator + CONTEXT_MB) - allocator)
        if not setting.quick:
            bench.case(f"{kind}, checkpointed", "plain", kind, steps, checkpointed=True, rival=speed)
        for part in (4,) if setting.quick else setting.of(FRACTIONS):
            budget = context + allocator / part
            bench.case(f"{kind}, exact in 1/{part}", "ours", kind, "exact", budget, batch, steps, budget_mb=budget, rival=speed)
    part = setting.of((4, 2))  # a head of the toy alone is a quarter
    whole = bench.case("resnet18, plain", "plain", "resnet18", setting.of((4, 1)))
    allocator = whole.get("allocator_mb", math.nan)
    budget = whole.get("outside_mb", allocator + (0 if setting.dry else CONTEXT_MB)) - (1 - 1 / part) * allocator
    small = bench.case(
        f"resnet18, backprop, batch 8, in 1/{part}",
        "ours",
        "resnet18",
        "backprop",
        budget,
        8,
        setting.of((256, 2)),
        budget_mb=budget,
    )
    rival = small.get("samples_per_second")
    bench.case(
        f"resnet18, neuroflux in 1/{part} (paper: {PAPER})", "ours", "resnet18", "neuroflux", budget, "auto", setting.of((16, 1)),
        budget_mb=budget, rival=rival,
    )  # fmt: skip
    if not setting.quick:
        bench.command("tests marked gpu", [sys.executable, *TESTS], 150)


def page(bench: Bench, setting: Setting) -> str:
    """What is said of the cases."""
    failed = sum(bool(row.faults) for row in bench.rows)
    where = "A dry run: toys on the CPU, our methods on a simulated device." if setting.dry else describe_gpu()
    return "\n\n".join(
        [
            f"{where} {len(bench.rows) - failed} of {len(bench.rows)} cases hold.",
            markdown_table(HEADS, [row.cells() for row in bench.rows]),
            "Memory from outside is what NVML says of the device above what it held before the case. The rival is plain PyTorch with "
            "everything on the device, and for neuroflux backprop with the batch that fits.",
        ]
    )


def no_gpu() -> str | None:
    """Why there is nothing to measure; None where there is."""
    import torch

    from lowmem_pnn.device.support import missing_kernels, why_no_gpu

    return missing_kernels(0) if torch.cuda.is_available() else why_no_gpu()


def describe_gpu() -> str:
    """The GPU, its driver, and what torch is built for."""
    import torch

    from lowmem_pnn.device.cuda_driver import NvidiaDriver

    properties, driver = torch.cuda.get_device_properties(0), NvidiaDriver(0)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, {properties.total_memory / 1e9:.1f} GB"
        f"{' of the host' if driver.is_unified() else ''}, CUDA {torch.version.cuda}, torch {torch.__version__}."
    )


def main() -> None:
    """Run one case, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the runs' files go: on the drive that is to be measured")
    parser.add_argument("--quick", action="store_true", help="leave out ResNet-50, most budgets, the trace and the tests")
    parser.add_argument("--dry", action="store_true", help="toys on the CPU, without a GPU; writes nothing")
    asked = parser.parse_args()
    # For this process and all that it starts: products that are the same every time, and the package in this checkout.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    places = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"], sys.path[:0] = os.pathsep.join(places), places[:2]
    if not asked.dry and (why := no_gpu()):
        sys.exit(f"bench/gpu.py: {why}; --dry tries the bench without a GPU")
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        setting = Setting(asked.dry, asked.quick, folder)
        bench = Bench(setting)
        run_all(bench, setting)
    text = page(bench, setting)
    if setting.dry:
        print(text)
    else:
        rows = [{"case": row.name, "budget_mb": row.budget_mb, "faults": row.faults, **row.found} for row in bench.rows]
        write_results("gpu", "What holds on a GPU", text, {"rows": rows})
    sys.exit(any(row.faults for row in bench.rows))


if __name__ == "__main__":
    main()
