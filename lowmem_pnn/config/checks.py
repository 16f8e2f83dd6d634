"""Checks of options against each other, and of those that only a plan or a device allows."""

from lowmem_pnn.config.faults import as_typed, flag
from lowmem_pnn.config.fit_config import FitConfig, recovering
from lowmem_pnn.config.transformers_place import TRANSFORMERS_TASKS, is_transformers
from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.units import format_bytes


def contradictions(config: FitConfig) -> list[str]:
    """Return what options say against each other, a text each.

    Args:
        config: options, each checked by itself.
    """
    faults = []
    if config.method == "exact":
        faults += [
            f"{flag(name)} has {len(getattr(config, name))} values, and --method exact trains all partitions together; give one value"
            for name in ("epochs", "batch_size", "shuffle")
            if getattr(config, name) != "auto" and len(getattr(config, name)) > 1
        ]
    if config.task in TRANSFORMERS_TASKS and not is_transformers(config.model):
        faults.append(f"--task {config.task} is the head of an hf: model, and --model is {config.model}; leave it out")
    if config.freeze and config.train_only:
        faults.append("--freeze and --train-only exclude each other; give one")
    if config.lora is not None and (config.freeze or config.train_only):
        faults.append(
            f"--lora freezes all but the adapters, and {'--freeze' if config.freeze else '--train-only'} would freeze otherwise; leave it out, "
            "and name modules that are to learn whole in --modules-to-save"
        )
    if config.unfreeze_at is not None and config.frozen_form != "fp32":
        faults.append(
            f"--unfreeze-at: what is kept in {config.frozen_form} never learns (--frozen-dtype); leave one of the two out"
        )
    if config.unfreeze_at is not None and config.unfreeze_at >= min(config.epochs):
        least = min(config.epochs)
        faults.append(
            f"--unfreeze-at {config.unfreeze_at}: the epochs are 0 to {least - 1}; give "
            + (f"at most {least - 1}, or more --epochs" if least > 1 else "more --epochs")
        )
    if config.recompute == "never" and config.compile:
        faults.append(
            "--recompute never keeps the products of single operations, and --compile makes code in which nobody sees them; leave one out"
        )
    if config.unfreeze_at is not None and config.compile:
        faults.append("--unfreeze-at trains layers in two ways, and --compile makes code of one; leave one out")
    if config.batch_size == "auto" and (config.method not in ("pnn", "neuroflux") or config.recovery_epochs):
        faults.append(
            "--batch-size auto: only partitions that learn by themselves can each have a batch of their own; give a number"
        )
    if config.mixing is not None and config.ignore_index is not None:
        faults.append(f"{config.mixing} mixes the labels of all samples, and --ignore-index leaves some out; leave one out")
    if config.eval_every is not None and config.parallel_sil:
        faults.append(
            "--eval-every measures the model while its last partition learns, and --parallel-sil joins it later; leave one out"
        )
    if config.keep_state and config.keep_weights == "best":
        faults.append("--keep-state goes on from the last weights, and --keep-weights best leaves others; leave one out")
    if config.method == "incubate":
        faults += [
            f"--method incubate trains a thin model of the whole from random weights, and {flag(name)} is for other methods; leave it out"
            for name in ("weights", "lora", "freeze", "train_only", "freeze_norm", "compile")
            if getattr(config, name) not in (None, "none", (), False)
        ]
    if config.parallel_sil and config.ignore_index is not None:
        faults.append("--parallel-sil learns from the vectors of the classes, and --ignore-index leaves one out; leave one out")
    if config.visits == "interleaved" and len(config.epochs) > 1:
        faults.append("--visits interleaved trains all blocks for the same epochs; give one number of --epochs")
    if config.visits == "interleaved" and len(config.shuffle) > 1:
        faults.append("--visits interleaved takes the samples through all blocks in one order; give one value of --shuffle")
    if config.laps > min(config.epochs):
        faults.append(
            f"--visits laps={config.laps}: there are {min(config.epochs)} epochs; give at most laps={min(config.epochs)}"
        )
    if config.blocks == "alike" and (config.cuts or config.partitions):
        faults.append("--blocks alike finds the cuts, and --cuts or --partitions give them; give one")
    if config.max_steps is not None and config.recovery_epochs:
        faults.append("--max-steps ends training, and --recovery-epochs goes on after it; give one")
    if config.min_lr > max(config.lr):
        faults.append(f"--min-lr {as_typed(config.min_lr)} is above --lr {as_typed(max(config.lr))}; give less")
    if config.watches and config.recovery_epochs and config.method in ("exact", "backprop"):
        faults.append(
            "--early-stop and --keep-weights best watch the epochs of --method exact or backprop, and --recovery-epochs adds others; leave one "
            "out"
        )
    if config.watches and config.parallel_sil and not config.recovery_epochs:
        faults.append(
            "--early-stop and --keep-weights best measure the model while its last partition learns, and --parallel-sil joins it later; give "
            "--recovery-epochs, or leave one out"
        )
    if config.parallel_sil and config.sil_target == "pooled":
        faults.append(
            "--parallel-sil needs labels that a partition can take as inputs, and --sil-target pooled has none; leave one out"
        )
    if config.plan_for == "time" and config.compile:
        faults.append("--plan-for time runs layers as they are, and --compile makes code of them; leave one out")
    if config.plan_for == "time" and config.batch_size == "auto":
        faults.append("--plan-for time compares plans for one batch size, and --batch-size auto looks for the largest; give one")
    if config.plan_for == "time" and config.parallel_sil:
        faults.append(
            "--plan-for time: processes side by side would each find a plan of their own; leave it out, or --parallel-sil"
        )
    if config.cuts and config.partitions:
        faults.append("--cuts and --partitions exclude each other; give one")
    if config.micro_batch is not None and config.micro_batch > max(config.batch_sizes):
        faults.append(
            f"--micro-batch {config.micro_batch} is above --batch-size {max(config.batch_sizes)}; "
            f"give at most {max(config.batch_sizes)}, or a larger --batch-size"
        )
    return faults


def useless_at_the_beginning(config: FitConfig) -> list[str]:
    """Return what a run should not begin with for it could never be used, a text each. Runs of earlier versions did.

    Args:
        config: options, each checked by itself.
    """
    if not config.keep_state or (fixed := of_fixed_length(config)) is None:
        return []
    instead = ", or give --lr-schedule constant" if fixed.startswith(flag("lr_schedule")) else ""
    return [f"--keep-state is for training a run further, which one with {fixed} cannot be; leave one of them out{instead}"]


def of_fixed_length(config: FitConfig) -> str | None:
    """Return the option for which a run would not end as one that began with more epochs, if it were trained further; None without one.

    Args:
        config: options of the run.

    Example:
        >>> of_fixed_length(FitConfig(max_gpu_mem="1GB", model="mlp:64-10", data="digits", method="exact", lr_schedule="cosine"))
        '--lr-schedule cosine'
    """
    if config.lr_schedule != "constant":
        return f"{flag('lr_schedule')} {config.lr_schedule}"
    return next(
        (f"{flag(name)} {value}" for name in ("recovery_epochs", "max_steps", "early_stop") if (value := getattr(config, name))),
        None,
    )


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
