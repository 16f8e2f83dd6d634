"""The folder of a run, where none is given."""

import re
from pathlib import Path

from lowmem_pnn.config.fit_config import FitConfig


def run_name(config: FitConfig) -> str:
    """Return a folder name for a run, from its model and method: letters, digits, '.', '_' and '-' alone.

    Example:
        >>> run_name(FitConfig(max_gpu_mem="1GB", model="mlp:64-32-10", data="digits"))
        'mlp-64-32-10-pnn'
    """
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(config.model).name).strip("-.") or "model"
    return f"{model[:60]}-{config.method}"


def next_workdir(config: FitConfig, parent: Path = Path("runs")) -> Path:
    """Return the first folder `runs/MODEL-METHOD-N` that does not exist, N from 1."""
    number = 1
    while (path := parent / f"{run_name(config)}-{number}").exists():
        number += 1
    return path
