"""The command `doctor`: what there is on this machine, what would limit a run, and what is wrong, as a block for a bug report."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import click
import psutil

from lowmem_pnn.cli.options import output_options
from lowmem_pnn.cli.output import announce, print_result
from lowmem_pnn.memory.available import AUTO_SHARE, available_bytes, bytes_for_budget
from lowmem_pnn.units import format_bytes

_PACKAGES = ("lowmem-pnn", "torch", "torchvision", "numpy", "safetensors", "pydantic", "matplotlib", "nvidia-ml-py")
_EXTRAS = {
    "timm": "timm", "transformers": "hf", "tokenizers": "tokenizers", "datasets": "hfdata", "pyarrow": "parquet", "onnx": "onnx",
    "torchao": "torchao",
}  # fmt: skip
_DRIVE_BYTES = 64_000_000
_FEW_FILES, _LITTLE_SPACE = 1024, 5_000_000_000


@dataclass
class Findings:
    """What was found.

    Args:
        facts: what there is, by name.
        problems: what is wrong or would limit a run, with what to do.
    """

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """Return them as lines of text."""
        width = max(map(len, self.facts))
        lines = [f"{name:<{width}}  {value}" for name, value in self.facts.items()]
        problems = [f"! {problem}" for problem in self.problems] or ["nothing is wrong"]
        return "\n".join([*lines, "", *problems])


@click.command()
@output_options
def doctor(as_json: bool, quiet: bool, debug: bool) -> None:
    """Show what this machine has, what would limit a run here, and what is wrong: a block to paste into a bug report."""
    if not quiet:
        announce("looking at packages, device, memory and drive; this takes some seconds")
    found = examine(Path.cwd())
    print_result(json.dumps({"schema_version": 1, **found.__dict__}, indent=1) if as_json else found.describe())


def examine(folder: Path) -> Findings:
    """Look at packages, device, memory, drive and limits.

    Args:
        folder: where runs would go; a file is written there and deleted.
    """
    found = Findings()
    for look in (_packages, _device, _memory, lambda each: _drive(each, folder), _limits):
        look(found)
    return found


def _packages(found: Findings) -> None:
    versions = {name: _version(name) for name in _PACKAGES}
    found.facts["system"] = f"{platform.platform()}, Python {platform.python_version()}"
    found.facts["packages"] = ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())
    extras = {name: importlib.util.find_spec(name) is not None for name in _EXTRAS}
    found.facts["extras"] = ", ".join(name for name, there in extras.items() if there) or "none"
    if missing := [extra for name, extra in _EXTRAS.items() if not extras[name]]:
        found.facts["not there"] = f"pip install 'lowmem-pnn[{','.join(missing)}]'"
    found.problems += mismatches(versions["torch"], versions["torchvision"], _version("pynvml"))
    try:
        importlib.import_module("torchvision.ops")
    except Exception as error:  # whatever an installation that does not fit raises
        reason = " ".join(str(error).split())[:200]
        found.problems.append(
            f"torchvision cannot be imported ({reason}); install it beside torch: pip install -U torch torchvision"
        )


def mismatches(torch: str | None, torchvision: str | None, pynvml: str | None) -> list[str]:
    """Return what is wrong about versions, a line each.

    Args:
        torch: version of torch.
        torchvision: version of torchvision.
        pynvml: version of the PyPI package `pynvml`; None where it is not there.

    Example:
        >>> mismatches("2.6.0", "0.20.1", None)
        ["torch 2.6.0 and torchvision 0.20.1 do not belong together; pip install 'torchvision==0.21.*'"]
    """
    problems = []
    own, other = (re.match(r"(\d+)\.(\d+)", version or "") for version in (torch, torchvision))
    if own and other and own[1] == "2" and other[1] == "0" and int(other[2]) != int(own[2]) + 15:
        wanted = f"0.{int(own[2]) + 15}.*"
        problems.append(
            f"torch {torch} and torchvision {torchvision} do not belong together; pip install 'torchvision=={wanted}'"
        )
    if pynvml is not None:
        problems.append(
            f"the package pynvml {pynvml} takes the place of nvidia-ml-py, which knows newer drivers; pip uninstall pynvml, and then "
            "pip install --force-reinstall nvidia-ml-py"
        )
    return problems


def _device(found: Findings) -> None:
    import torch

    threads = f"{torch.get_num_threads()} threads of torch on {os.cpu_count()} cores"
    found.facts["cpu"] = f"{_cpu_name()}, {threads}"
    from lowmem_pnn.device.support import has_driver, missing_kernels, why_no_gpu

    if not torch.cuda.is_available():
        found.facts["gpu"] = f"none: {why_no_gpu()}"
        if has_driver():
            found.problems.append(f"there is an NVIDIA driver, and no GPU is taken: {why_no_gpu()}")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found.facts[f"gpu {number}"] = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, {format_bytes(free)} of {format_bytes(total)} free, "
            f"CUDA {torch.version.cuda}, driver {_driver()}"
        )
        if missing := missing_kernels(number):
            found.problems.append(f"gpu {number} cannot be used: {missing}")


def _memory(found: Findings) -> None:
    memory = psutil.virtual_memory()
    free = available_bytes("cpu")
    group = f", {format_bytes(free)} of it left by the control group" if free < memory.available else ""
    found.facts["memory"] = f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free{group}"
    found.facts["budget"] = f"--max-gpu-mem auto would be {format_bytes(AUTO_SHARE * bytes_for_budget('cpu'))} on the CPU"


def _drive(found: Findings, folder: Path) -> None:
    from lowmem_pnn.profiling.machine_benchmark import time_drive

    try:
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryDirectory(dir=folder, prefix=".lowmem-pnn-doctor-") as place:
            nbytes = min(_DRIVE_BYTES, free // 4)
            read, write = time_drive(Path(place), nbytes) if nbytes else (0.0, 0.0)
    except OSError as error:
        found.problems.append(f"{folder} cannot be written to ({error.strerror}); begin runs elsewhere, --workdir DIR")
        return
    rates = "its rates were not measured, since nothing could be written"
    if read and write:
        rates = f"{format_bytes(1 / read)}/s read, {format_bytes(1 / write)}/s written"
    found.facts["drive"] = f"{folder}: {format_bytes(free)} free; {rates}"
    if free < _LITTLE_SPACE:
        found.problems.append(
            f"{folder} has {format_bytes(free)} left; a run needs 12 bytes a parameter with AdamW, and activations"
        )


def _limits(found: Findings) -> None:
    texts = []
    for name, what in (("NOFILE", "open files"), ("DATA", "private memory"), ("AS", "address space")):
        soft, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))
        told = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,}" if name == "NOFILE" else format_bytes(soft)
        texts.append(f"{what} {told}")
        if name == "NOFILE" and hard != resource.RLIM_INFINITY and hard < _FEW_FILES:
            found.problems.append(f"only {hard} files may be open; a model of many partitions opens more: raise ulimit -Hn")
        if name != "NOFILE" and soft != resource.RLIM_INFINITY:
            found.problems.append(f"{what} is limited to {format_bytes(soft)} by ulimit, below which a budget has to stay")
    found.facts["limits"] = ", ".join(texts)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "CPU"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _driver() -> str:
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception:  # NVML is optional everywhere, and raises errors of its own
        return "unknown"
