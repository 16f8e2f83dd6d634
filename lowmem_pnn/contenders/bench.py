"""The bench: runs every contender for a few steps, each in a process of its own, and says what it took."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowmem_pnn.config.configure import configure, for_method
from lowmem_pnn.config.fit_config import METHODS, FitConfig, MethodName
from lowmem_pnn.contenders.bench_report import BenchReport, BenchRow
from lowmem_pnn.contenders.outside_meter import OutsideMeter
from lowmem_pnn.contenders.plain_process import BASELINES, Baseline
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.memory.available import available_bytes, budget_of
from lowmem_pnn.settings.command import option_words
from lowmem_pnn.units import format_bytes, parse_bytes

# What a contender's run is not for: commits, logs, a page.
_SHORT: Mapping[str, Any] = {"epochs": (1,), "val_fraction": 0.0, "test_limit": 1, "commit_every": 1e6, "log_every": 1_000_000}
# Allocators and kernels keep up to so many times what plain PyTorch is predicted to need.
_PLAIN_MARGIN = 1.3


def bench(
    model: str,
    data: str,
    *,
    budgets: Sequence[str | int],
    methods: str | Sequence[str] = "all",
    baselines: str | Sequence[str] = BASELINES,
    steps: int = 10,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> BenchReport:
    """Measure peak memory and speed of training methods, and of plain PyTorch beside them, as the command `lowmem-pnn bench` does.

    Every contender trains the same model for a few steps in a process of its own, one after the other, and is watched from outside.

    Args:
        model: name of a model, as the command takes it; objects have no name, `file.py:factory` has.
        data: name of a data set, as the command takes it.
        budgets: budgets that each method is given in turn, as sizes or in bytes.
        methods: "all", or names of methods.
        baselines: ways of plain PyTorch: `plain`, `checkpointing` (about as many segments as the square root of the layers' number),
            `accumulation` (8 micro-batches a batch); "none" for none.
        steps: optimizer steps.
        say: is told which contender begins.
        **options: other fields of `FitConfig`.

    Returns:
        A row for each contender: what does not fit says why.

    Raises:
        ConfigError: an option, a model or a data set that cannot be used, or a contender that there is not.
    """
    if not isinstance(model, str) or not isinstance(data, str):
        raise ConfigError(
            "bench runs every contender in a process of its own: give model and data by name, file.py:factory for your own"
        )
    asked = _names("methods", methods, METHODS)
    plain: list[Any] = [] if baselines == "none" else _names("baselines", baselines, BASELINES)
    device = options.get("device") or "auto"
    sizes = [parse_bytes(budget_of(budget, device)) for budget in budgets]
    if not sizes:
        raise ConfigError("--budgets is missing; give --budgets 1GB,500MB")
    base = configure(max_gpu_mem=max(sizes), model=model, data=data, **{**options, "method": "backprop"})
    if len(base.batch_sizes) > 1 or base.batch_size == "auto":
        raise ConfigError("bench trains all contenders with the same batches; give one number as --batch-size")
    if base.logger != "none":
        raise ConfigError("--logger has no effect here: bench keeps none of its runs; leave it out")
    base = dataclasses.replace(base, **_SHORT, train_limit=min(base.train_limit or sys.maxsize, steps * base.batch_sizes[0]))
    rows: list[BenchRow] = []
    device_text, needs = "", None
    versions: dict[str, str] = {}
    root = ["--data-root", str(base.data_root)] if options.get("data_root") is not None else []
    with tempfile.TemporaryDirectory(prefix="lowmem-pnn-bench-") as name:
        folder = Path(name)
        for size in sizes:
            for method in asked:
                say(f"{method} in {format_bytes(size)}")
                row, result = _run_method(base, method, size, folder / f"{method}-{size}", root)
                rows.append(row)
                device_text, versions = result.get("device", device_text), result.get("versions", versions)
                needs = result.get("plain_bytes") or needs
        free = available_bytes("cpu") if base.device == "cpu" else None
        for baseline in plain:
            say(baseline)
            if baseline == "plain" and needs is not None and free is not None and _PLAIN_MARGIN * needs > free:
                reason = f"it needs about {format_bytes(needs)}, and {format_bytes(free)} are free"
                rows.append(BenchRow(contender=baseline, predicted_peak_bytes=needs, reason=reason))
                continue
            row = _run_baseline(base, baseline, folder, max(sizes))
            rows.append(dataclasses.replace(row, predicted_peak_bytes=needs if baseline == "plain" else None))
    beside = next((row.samples_per_second for row in rows if row.contender == "plain"), None)
    if beside:
        rows = [
            row if row.samples_per_second is None else dataclasses.replace(row, speed=row.samples_per_second / beside)
            for row in rows
        ]
    return BenchReport(
        model=model,
        data=data,
        device=device_text or base.device,
        batch_size=base.batch_sizes[0],
        steps=steps,
        rows=rows,
        versions=dict(versions),
    )


def _names(what: str, given: str | Sequence[str], known: Sequence[str]) -> list[Any]:
    """Return the names in a list, or in a text with commas between them; all of them for `all`."""
    names = given.split(",") if isinstance(given, str) else list(given)
    if names == ["all"]:
        return list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"--{what} {name!r} is none of {', '.join(known)}, all")
    return names


def _run_method(
    base: FitConfig, method: MethodName, budget: int, workdir: Path, more: Sequence[str]
) -> tuple[BenchRow, dict[str, Any]]:
    """Run the command in a budget; its row, and what `result.json` says."""
    row = BenchRow(contender=method, budget_bytes=budget)
    try:
        config = dataclasses.replace(for_method(base, method), max_gpu_mem=budget)
    except ConfigError as error:
        return dataclasses.replace(row, reason=str(error)), {}
    words = ["fit", *option_words(config), *more, "--workdir", str(workdir), "--json", "--quiet", "--no-report"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lowmem_pnn", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    # The run's folder is made when the floor has been taken and the plan is there.
    meter = OutsideMeter(process.pid, (workdir / "journal.json").exists, of_child=True)
    out, err = _watched(process, meter)
    if process.returncode:
        lines = err.strip().splitlines() or [f"exit code {process.returncode}"]
        enough = None
        with suppress(ValueError, TypeError):
            enough = json.loads(out).get("enough_bytes")
        # A budget is one of several here.
        reason = lines[-1].removeprefix("lowmem-pnn: ").replace("give --max-gpu-mem", "give --budgets")
        return dataclasses.replace(row, reason=reason, enough_bytes=enough), {}
    result = json.loads(out)
    on_host = result["device"].startswith("cpu")
    peak = meter.peak_bytes - result["floor_bytes"] if on_host and meter.peak_bytes else result["peak_bytes"]
    parts = result["partitions"]
    # Samples that are learnt count for every partition, where partitions learn by themselves.
    samples = result["samples_per_second"] * result["seconds"] / (len(parts) if method in ("pnn", "neuroflux", "incubate") else 1)
    seconds = sum(part["seconds"] for part in parts) + result["meta"].get("seconds", 0.0)
    return (
        dataclasses.replace(
            row,
            peak_bytes=peak,
            predicted_peak_bytes=result["predicted_peak_bytes"],
            samples_per_second=samples / max(seconds, 1e-9),
            fits=peak <= budget,
            bytes_written=result["bytes_written"],
            reason="" if peak <= budget else "THE BUDGET WAS PASSED",
        ),
        result,
    )


def _run_baseline(base: FitConfig, baseline: Baseline, folder: Path, largest: int) -> BenchRow:
    """Run plain PyTorch; its row."""
    settings = folder / f"{baseline}.json"
    settings.write_text(json.dumps({"config": json.loads(base.to_json()), "baseline": baseline}))
    said = folder / f"{baseline}.out"
    with said.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "lowmem_pnn.contenders.plain_process", str(settings)],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        meter = OutsideMeter(process.pid, lambda: said.stat().st_size > 0)
        _, err = _watched(process, meter)
    row = BenchRow(contender=baseline)
    lines = said.read_text().splitlines()
    if process.returncode or not lines:
        told = err.strip().splitlines() or [f"exit code {process.returncode}"]
        return dataclasses.replace(row, reason=told[-1][:300])
    floor, figures = int(next(line.split()[1] for line in lines if line.startswith("floor "))), json.loads(lines[-1])
    peak = figures["device_peak_bytes"] or meter.peak_bytes - floor
    return dataclasses.replace(
        row, peak_bytes=peak, samples_per_second=figures["samples"] / max(figures["seconds"], 1e-9), fits=peak <= largest
    )


def _watched(process: "subprocess.Popen[str]", meter: OutsideMeter) -> tuple[str, str]:
    """Wait for a process while a meter looks on; what it printed. It ends with the bench."""
    meter.start()
    try:
        return process.communicate()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        meter.stop()
