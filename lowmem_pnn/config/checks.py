"""Checks of options that only a plan or a device allows."""

from lowmem_pnn.config.faults import as_typed, flag
from lowmem_pnn.config.fit_config import FitConfig, recovering
from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.units import format_bytes


def check_lengths(config: FitConfig, num_partitions: int) -> None:
    """Check that lists of values per partition fit the number of partitions.

    Args:
        config: options of the run.
        num_partitions: partitions of the plan.

    Raises:
        ConfigError: a list of another length.
    """
    if config.recovery_epochs:
        learners = recovering(config, num_partitions)
        if not learners or learners[-1] >= num_partitions:
            which = "is one partition" if num_partitions == 1 else f"are {num_partitions} partitions"
            raise ConfigError(
                f"--recover {as_typed(config.recover)}: there {which}; give numbers from 1 to {num_partitions}, or all"
            )
    for name, wanted in (
        ("epochs", num_partitions),
        ("batch_size", num_partitions),
        ("optimizer", num_partitions),
        ("lr", num_partitions),
        ("shuffle", num_partitions),
        ("kappa", num_partitions - 1),
    ):
        given = len(config.batch_sizes if name == "batch_size" else getattr(config, name))
        if given not in (1, wanted):
            what = "boundary" if name == "kappa" else "partition"
            plural = {"boundary": "boundaries"}.get(what, what + "s")
            raise ConfigError(
                f"{flag(name)} has {given} values, and there {'is' if wanted == 1 else 'are'} {wanted or 'no'} "
                f"{what if wanted == 1 else plural}; give one value{f' or {wanted}' if wanted > 1 else ''}, "
                "or set --cuts or --partitions"
            )


def check_device(config: FitConfig, on_cpu: bool, memory_bytes: int) -> None:
    """Check what can only be told once the device is known.

    Args:
        config: options of the run.
        on_cpu: whether the training device is the host.
        memory_bytes: memory of the host.

    Raises:
        ConfigError: an option that would have no effect there.
        BudgetError: on the CPU, a budget above the memory that there is.
    """
    if not on_cpu:
        if config.compile:
            raise ConfigError(
                "--compile has no effect here: it needs the CPU, and this run is on a GPU; leave it out, or give --device cpu"
            )
        return
    for name, need in (
        ("budget_scope", "a CUDA device"),
        ("tf32", "a CUDA device"),
        ("max_host_mem", "a CUDA device (on the CPU, --max-gpu-mem is that bound)"),
    ):
        if getattr(config, name) not in (None, False, "process"):
            raise ConfigError(f"{flag(name)} has no effect here: it needs {need}, and this run is on the CPU; leave it out")
    if config.max_gpu_mem > memory_bytes:
        raise BudgetError(
            f"--max-gpu-mem {format_bytes(config.max_gpu_mem)} is more than this machine has, {format_bytes(memory_bytes)}; give less"
        )
