"""Another machine than a run was trained on: its options there, for what comes after training."""

import dataclasses

from lowmem_pnn.config.configure import checked
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.device.support import budget_on, is_gpu


def options_here(config: FitConfig, max_gpu_mem: str | int | None, device: str | None) -> FitConfig:
    """Return the options of a run for what comes after training, which may be on another machine than the training was.

    Layers run as they are, uncompiled, and on the CPU what only a GPU reads is left out: a run may be used where it could not be begun.

    Args:
        config: options of the run.
        max_gpu_mem: another budget, a size or a share of what is free here; None for the run's.
        device: another device; None for the run's.

    Raises:
        ConfigError: it is no size or share, or no device.
    """
    max_gpu_mem = budget_on(device or config.device, max_gpu_mem)
    other = {name: value for name, value in (("max_gpu_mem", max_gpu_mem), ("device", device)) if value is not None}
    config = (
        checked({field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | other) if other else config
    )
    config = dataclasses.replace(config, compile=False)
    if is_gpu(config.device):
        return config
    return dataclasses.replace(config, tf32=False, budget_scope="process", max_host_mem=None)
