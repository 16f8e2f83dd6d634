"""The bench: runs every contender for a few steps, each in a process of its own, and says what it took."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lowmem_pnn.config.checks import check_lengths
from lowmem_pnn.config.faults import as_typed
from lowmem_pnn.config.fit_config import METHODS, FitConfig, MethodName
from lowmem_pnn.contenders.bench_report import BenchReport, BenchRow
from lowmem_pnn.contenders.contender_options import contender_configs, refuse_left_out
from lowmem_pnn.contenders.outside_meter import OutsideMeter
from lowmem_pnn.contenders.plain_process import ACCUMULATED, BASELINES, Baseline
from lowmem_pnn.device import CpuDevice
from lowmem_pnn.device.support import budget_on, is_gpu
from lowmem_pnn.errors import ConfigError, LowMemError
from lowmem_pnn.memory.available import available_bytes
from lowmem_pnn.settings.command import option_words
from lowmem_pnn.units import format_bytes, parse_bytes
from lowmem_pnn.workload import make_workload, profile_workload
from lowmem_pnn.workload.inputs import Inputs, named_inputs
from lowmem_pnn.workload.plain_training import accumulated_training_bytes, checkpointed_training_bytes, plain_training_bytes

# Allocators and kernels keep up to so many times what plain PyTorch is predicted to need.
_PLAIN_MARGIN = 1.3
# Seconds that a contender is given to end in when the bench is stopped, twice.
_PATIENCE = 3.0


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
        steps: optimizer steps; fewer where the data has fewer in an epoch.
        say: is told which contender begins.
        **options: other fields of `FitConfig`; each method takes those that it reads.

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
    sizes = [parse_bytes(budget_on(device, budget)) for budget in budgets]
    if not sizes:
        raise ConfigError("--budgets is missing; give --budgets 1GB,500MB")
    refuse_left_out([name for name, value in options.items() if value is not None])
    beside_plain: list[MethodName] = ["backprop"] if plain else []
    configs = contender_configs([*asked, *beside_plain], max(sizes), {**options, "model": model, "data": data})
    base = next(config for config in configs.values() if isinstance(config, FitConfig))
    if len(base.batch_sizes) > 1 or base.batch_size == "auto":
        raise ConfigError(
            f"--batch-size {as_typed(base.batch_size)}: bench trains all contenders with the same batches; give one number"
        )
    batch = base.batch_sizes[0]
    limits: dict[str, Any] = {"train_limit": min(base.train_limit or sys.maxsize, steps * batch)}
    inputs = named_inputs(dataclasses.replace(base, **limits))
    if "test" in inputs.splits:
        limits["test_limit"] = 1  # a run tests, and this one is not for that
    if (there := math.ceil(len(inputs.splits["train"]) / batch)) < steps:
        say(f"{there} steps each, and not {steps}: there are {len(inputs.splits['train']):,} samples to train on")
    configs = {
        method: dataclasses.replace(config, **limits) if isinstance(config, FitConfig) else config
        for method, config in configs.items()
    }
    foreseen = _foreseen(configs["backprop"], inputs) if plain and not is_gpu(base.device) else {}
    del inputs
    rows: list[BenchRow] = []
    device_text, needs = "", None
    versions: dict[str, str] = {}
    root = ["--data-root", str(base.data_root)] if options.get("data_root") is not None else []
    with tempfile.TemporaryDirectory(prefix=".lowmem-pnn-bench-", dir=_place(), ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for size in sizes:
            for method in asked:
                say(f"{method} in {format_bytes(size)}")
                row, result = _run_method(configs[method], method, size, folder / f"{method}-{size}", root)
                rows.append(row)
                device_text, versions = result.get("device", device_text), result.get("versions", versions)
                needs = result.get("plain_bytes") or needs
        if needs is not None:
            foreseen["plain"] = needs
        for baseline in plain:
            say(baseline)
            rows.append(_run_baseline(configs["backprop"], baseline, folder, max(sizes), foreseen.get(baseline)))
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
        batch_size=batch,
        steps=min(steps, there),
        rows=rows,
        versions=dict(versions),
    )


def _place() -> Path | None:
    """Return where the runs are kept meanwhile: where they would be, since temporary files may lie in memory; None for among these."""
    here = Path.cwd()
    return here if os.access(here, os.W_OK | os.X_OK) else None


def _names(what: str, given: str | Sequence[str], known: Sequence[str]) -> list[Any]:
    """Return the names in a list, or in a text with commas between them; all of them for `all`."""
    names = given.split(",") if isinstance(given, str) else list(given)
    if names == ["all"]:
        return list(known)
    for name in names:
        if name not in known:
            raise ConfigError(f"--{what} {name!r} is none of {', '.join(known)}, all")
    return names


def _foreseen(config: FitConfig | ConfigError, inputs: Inputs) -> dict[Baseline, int]:
    """Return the bytes that plain PyTorch takes on the CPU in each way; nothing where its own process will say what is wrong."""
    if isinstance(config, ConfigError):
        return {}
    device, batch = CpuDevice(config.max_gpu_mem), config.batch_sizes[0]
    with suppress(LowMemError):
        profile = profile_workload(make_workload(config, *inputs, device.torch_device), device)
        return {
            "plain": plain_training_bytes(profile, batch),
            "checkpointing": checkpointed_training_bytes(profile, batch),
            "accumulation": accumulated_training_bytes(profile, batch, math.ceil(batch / ACCUMULATED)),
        }
    return {}


def _run_method(
    config: FitConfig | ConfigError, method: MethodName, budget: int, workdir: Path, more: Sequence[str]
) -> tuple[BenchRow, dict[str, Any]]:
    """Run the command in a budget; its row, and what `result.json` says."""
    row = BenchRow(contender=method, budget_bytes=budget)
    if isinstance(config, ConfigError):
        return dataclasses.replace(row, reason=str(config), exit_code=config.exit_code), {}
    config = dataclasses.replace(config, max_gpu_mem=budget)
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
        return dataclasses.replace(row, reason=reason, enough_bytes=enough, exit_code=process.returncode), {}
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


def _run_baseline(
    config: FitConfig | ConfigError, baseline: Baseline, folder: Path, largest: int, foreseen: int | None
) -> BenchRow:
    """Run plain PyTorch, unless it needs more memory than is free; its row."""
    row = BenchRow(contender=baseline)
    try:
        if isinstance(config, ConfigError):
            raise config
        check_lengths(config, 1)
    except ConfigError as error:
        return dataclasses.replace(row, reason=str(error), exit_code=error.exit_code)
    if foreseen is not None and not is_gpu(config.device) and _PLAIN_MARGIN * foreseen > (free := available_bytes("cpu")):
        reason = f"it needs about {format_bytes(foreseen)}, and {format_bytes(free)} are free"
        return dataclasses.replace(row, predicted_peak_bytes=foreseen, reason=reason)
    settings = folder / f"{baseline}.json"
    settings.write_text(json.dumps({"config": json.loads(config.to_json()), "baseline": baseline}))
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
    lines = said.read_text().splitlines()
    if process.returncode or not lines:
        told = err.strip().splitlines() or [f"exit code {process.returncode}"]
        return dataclasses.replace(row, reason=told[-1][:300], exit_code=process.returncode or None)
    floor, figures = int(next(line.split()[1] for line in lines if line.startswith("floor "))), json.loads(lines[-1])
    peak = figures["device_peak_bytes"] or meter.peak_bytes - floor
    return dataclasses.replace(
        row,
        peak_bytes=peak,
        predicted_peak_bytes=foreseen if baseline == "plain" else None,
        samples_per_second=figures["samples"] / max(figures["seconds"], 1e-9),
        fits=peak <= largest,
    )


def _watched(process: "subprocess.Popen[str]", meter: OutsideMeter) -> tuple[str, str]:
    """Wait for a process while a meter looks on; what it printed. Whatever ends the wait by an exception ends the process, too."""
    meter.start()
    try:
        return process.communicate()
    except BaseException:
        try:
            # A run stops after its batch when it is asked once, and at once when it is asked twice.
            for _ in range(2):
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE)
        finally:
            process.kill()  # and the kernel its worker
            process.communicate()
        raise
    finally:
        meter.stop()
