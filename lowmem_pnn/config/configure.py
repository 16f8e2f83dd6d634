"""The configuration of a run, made from what a user gave: defaults, checks, and options that exclude each other."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError as PydanticError

from lowmem_pnn.config.adapter_options import DEFAULTS_WITH_ADAPTERS
from lowmem_pnn.config.code import CODE_FIELDS
from lowmem_pnn.config.defaults import is_language, training_defaults, undecided
from lowmem_pnn.config.faults import as_typed, describe_fault, flag
from lowmem_pnn.config.fit_config import FitConfig, MethodName, default_of, field_names
from lowmem_pnn.config.language_options import LANGUAGE_KINDS, ROWS_OF_TEXT
from lowmem_pnn.config.transformers_place import TRANSFORMERS_TASKS, has_weights, is_transformers, place_of
from lowmem_pnn.errors import ConfigError, UnitError
from lowmem_pnn.units import MEGABYTE

# Trained when neither a model nor data is named: larger than 2 GB with its optimizer state, and learnt in a minute.
DEMONSTRATION: Mapping[str, Any] = {
    "model": "mlp:64-8192-8192-8192-10",
    "data": "digits",
    "epochs": (3,),
    "lr": (1e-4,),
    "kappa": (1.0,),
}

# Kinds of data that name a file or a folder.
_FILE_KINDS = ("npz", "imagefolder", "text", "jsonl", "tokens", "csv", "parquet", "segmentation")
# Data that becomes tokens, which are kept in `data_root`.
_TOKENISED = ("text", "jsonl", *ROWS_OF_TEXT)
# Data sets that are kept there.
DOWNLOADED = ("mnist", "fashion-mnist", "emnist-balanced", "cifar10", "cifar100")

# Options that only some choice of another option reads: (option, what it needs, does this run have it?).
_CONDITIONAL: tuple[tuple[str, str, Callable[[FitConfig], bool]], ...] = (
    ("kappa", "--method pnn", lambda config: config.method == "pnn"),
    ("sil", "--method pnn", lambda config: config.method == "pnn"),
    ("sil_target", "--method pnn", lambda config: config.method == "pnn"),
    ("visits", "--method neuroflux", lambda config: config.method == "neuroflux"),
    ("macro_batches", "--visits interleaved", lambda config: config.visits == "interleaved"),
    ("views", "--augment", lambda config: config.augment != "none"),
    ("views", "--visits sequential or laps=L", lambda config: config.visits != "interleaved"),
    ("views", "--method neuroflux or incubate", lambda config: config.views == 1 or config.method in ("neuroflux", "incubate")),
    ("mixup", "--method exact, backprop, neuroflux or incubate", lambda config: config.method != "pnn"),
    ("cutmix", "--method exact, backprop, neuroflux or incubate", lambda config: config.method != "pnn"),
    ("blocks", "--method neuroflux", lambda config: config.method == "neuroflux"),
    ("block_tolerance", "--blocks alike", lambda config: config.blocks == "alike"),
    ("exit_tolerance", "--method neuroflux", lambda config: config.method == "neuroflux"),
    ("heads", "--method neuroflux", lambda config: config.method == "neuroflux"),
    ("local_loss", "--method neuroflux", lambda config: config.method == "neuroflux"),
    ("parallel_sil", "--method pnn", lambda config: config.method == "pnn"),
    ("activation_dtype", "--method pnn, neuroflux or incubate", lambda config: config.method in ("pnn", "neuroflux", "incubate")),
    ("meta_epochs", "--method incubate", lambda config: config.method == "incubate"),
    ("activation_dtype", "partitions that learn from activations (no --parallel-sil)", lambda config: not config.parallel_sil),
    ("unfreeze_at", "--method exact", lambda config: config.method == "exact"),
    ("unfreeze_at", "--freeze or --train-only", lambda config: bool(config.freeze or config.train_only)),
    ("modules_to_save", "--lora", lambda config: config.lora is not None),
    ("frozen_dtype", "--lora, --freeze or --train-only", lambda config: bool(config.lora or config.freeze or config.train_only)),
    ("weights_dtype", "--optimizer adam or adamw", lambda config: "sgd" not in config.optimizer),
    ("weights_dtype", "layers that are not compiled (no --compile)", lambda config: not config.compile),
    ("weights_dtype", "weights that learn from the beginning (no --unfreeze-at)", lambda config: config.unfreeze_at is None),
    ("cache_frozen", "--method exact", lambda config: config.method == "exact"),
    ("cuts", "--method pnn, neuroflux, incubate or exact", lambda config: config.method != "backprop"),
    ("partitions", "--method pnn, neuroflux, incubate or exact", lambda config: config.method != "backprop"),
    ("plan_for", "cuts that are left to the planner", lambda config: config.cuts is None),
    (
        "plan_for",
        "--method pnn, neuroflux, exact or backprop (plans of incubate are made for the memory beside its meta model)",
        lambda config: config.plan_for != "time" or config.method != "incubate",
    ),
    (
        "recompute",
        "--method exact, or --recovery-epochs",
        lambda config: config.recompute == "auto" or config.method == "exact" or config.recovery_epochs > 0,
    ),
    (
        "loss_chunk",
        "--method pnn, incubate, exact or backprop (every unit of neuroflux has a loss of its own)",
        lambda config: config.loss_chunk is None or config.method != "neuroflux",
    ),
    (
        "recovery_epochs",
        "--method pnn, incubate, exact or backprop",
        lambda config: config.recovery_epochs == 0 or config.method != "neuroflux",
    ),
    ("recover", "--recovery-epochs", lambda config: config.recovery_epochs > 0),
    ("warmup_steps", "--lr-schedule constant, linear or cosine", lambda config: config.lr_schedule != "onecycle"),
    ("early_stop", "--method exact or backprop", lambda config: config.method in ("exact", "backprop")),
    ("keep_weights", "--method exact or backprop", lambda config: config.method in ("exact", "backprop")),
    ("eval_every", "--method pnn, exact or backprop", lambda config: config.method not in ("neuroflux", "incubate")),
    ("monitor", "--early-stop or --keep-weights best", lambda config: config.watches),
    ("min_lr", "--lr-schedule linear or cosine", lambda config: config.lr_schedule in ("linear", "cosine")),
    ("keep_state", "--method exact or backprop", lambda config: config.method in ("exact", "backprop")),
    ("max_steps", "--method exact or backprop", lambda config: config.method in ("exact", "backprop")),
    ("betas", "--optimizer adam or adamw", lambda config: set(config.optimizer) != {"sgd"}),
    ("eps", "--optimizer adam or adamw", lambda config: set(config.optimizer) != {"sgd"}),
    ("no_decay", "--weight-decay above 0", lambda config: config.weight_decay > 0),
    ("no_decay_norms", "--weight-decay above 0", lambda config: config.weight_decay > 0),
    ("momentum", "--optimizer sgd", lambda config: "sgd" in config.optimizer),
    ("optimizer_state", "--optimizer adam or adamw", lambda config: "sgd" not in config.optimizer),
    ("tf32", "--precision fp32", lambda config: config.precision == "fp32"),
    ("tf32", "a CUDA device", lambda config: config.device != "cpu"),
    ("host_tier", "a CUDA device", lambda config: config.device != "cpu"),
    ("budget_scope", "a CUDA device", lambda config: config.device != "cpu"),
    ("max_host_mem", "a CUDA device (on the CPU, --max-gpu-mem bounds the host)", lambda config: config.device != "cpu"),
    (
        "data_root",
        "a data set that is downloaded, or text that is tokenised",
        lambda config: any(spec in DOWNLOADED for spec in _sources(config)) or _has(config, *_TOKENISED),
    ),
    ("tokenizer", "data of text (text:, jsonl:, tokens:, parquet:, hfdata:)", lambda config: _has(config, "tokens", *_TOKENISED)),
    ("context", "data of text (text:, jsonl:, tokens:, parquet:, hfdata:)", lambda config: _has(config, "tokens", *_TOKENISED)),
    ("target_context", "a model that writes (hf: with --task seq2seq)", lambda config: is_transformers(config.model)),
    ("pack", "documents (text:, jsonl:, parquet:, hfdata:)", lambda config: _has(config, *_TOKENISED)),
    ("sample", "data of text (text:, jsonl:, tokens:, parquet:, hfdata:)", lambda config: _has(config, "tokens", *_TOKENISED)),
    ("sample_tokens", "--sample", lambda config: config.sample is not None),
    ("loss_on", "prompts or messages (jsonl:, parquet:, hfdata:)", lambda config: _has(config, "jsonl", *ROWS_OF_TEXT)),
    (
        "target",
        "data with columns (csv:, parquet:, jsonl:, hfdata:, or from Python a data frame alone)",
        lambda config: config.data.startswith(("csv:", "parquet:", "jsonl:", "hfdata:")) or config.data.endswith("DataFrame"),
    ),
    ("resize", "--image-size", lambda config: config.image_size is not None),
    (
        "skip_broken",
        "data of your own (imagefolder:, npz:, csv:, parquet:, segmentation:, hfdata:, file.py:factory)",
        lambda config: any(
            spec not in ("digits", *DOWNLOADED) and spec.partition(":")[0] not in LANGUAGE_KINDS for spec in _sources(config)
        ),
    ),
    (
        "model_arg",
        "a model that is built by a factory (not mlp: or gpt:)",
        lambda config: config.model.partition(":")[0] not in ("mlp", "gpt"),
    ),
)


def _has(config: FitConfig, *kinds: str) -> bool:
    """Return whether the training data is of any of the given kinds."""
    return config.data.partition(":")[0] in kinds


def _sources(config: FitConfig) -> list[str]:
    """Return the texts that name data."""
    return [spec for spec in (config.data, config.val_data, config.test_data) if spec is not None]


def configure(**given: Any) -> FitConfig:
    """Make a configuration from what a user gave, with the defaults for the rest.

    With neither `model` nor `data` this is the demonstration: a multilayer perceptron with 2.16 GB of training state, on the digits
    that come with scikit-learn.

    Args:
        **given: fields of `FitConfig`; None means not given.

    Returns:
        A checked configuration.

    Raises:
        ConfigError: all faults, in one line.

    Example:
        >>> configure(max_gpu_mem="2GB").model
        'mlp:64-8192-8192-8192-10'
        >>> configure(max_gpu_mem="2GB", method="pnm")
        Traceback (most recent call last):
        lowmem_pnn.errors.ConfigError: --method 'pnm' is none of pnn, neuroflux, incubate, exact, backprop; did you mean 'pnn'?
    """
    given = given_options(given)
    config = with_defaults(given)
    size = given["max_gpu_mem"]
    # A number from Python is bytes, but nobody means a few.
    has_no_unit = size.strip().isdigit() if isinstance(size, str) else isinstance(size, int) and size < 1000
    if config.max_gpu_mem < MEGABYTE and has_no_unit:
        raise UnitError(f"--max-gpu-mem {size} is {size} bytes; did you mean {size}GB?")
    faults = [f"{flag(name)} has no effect here: it needs {need}" for name, need in unmet(config, given)]
    faults += contradictions(config)
    if faults:
        raise ConfigError("; ".join(faults))
    return config


def with_defaults(given: Mapping[str, Any]) -> FitConfig:
    """Return what was given with the defaults for the rest, each option checked by itself.

    Args:
        given: fields of `FitConfig`, as `given_options` returns them.

    Raises:
        ConfigError: all faults, in one line.
    """
    values = {"data_root": Path("data").absolute(), **given}
    if "model" not in given and "data" not in given:
        values = {**DEMONSTRATION, **values}
    model = str(values.get("model", ""))
    if "weights" not in given and has_weights(model):
        values["weights"] = "default"
    pretrained = values.get("weights") not in (None, "none")
    if pretrained and (fault := undecided(values)) is not None:
        raise ConfigError(fault)
    defaults = training_defaults(pretrained=pretrained, language=is_language(values), transformers=is_transformers(model))
    values = {**defaults, **values}
    if given.get("lora") is not None:
        values = {**values, **DEFAULTS_WITH_ADAPTERS, **given}
    return checked(values)


def unmet(config: FitConfig, given: Collection[str]) -> list[tuple[str, str]]:
    """Return the options that were given and are not read, each with what it needs.

    Args:
        config: options, each checked by itself.
        given: names of those that were given.
    """
    return [(name, need) for name, need, holds in _CONDITIONAL if name in given and not holds(config)]


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, paths in full: a run may be resumed from another folder than it was begun in.

    Args:
        options: fields of `FitConfig`; None means not given.
    """
    return {name: _absolute(name, value) for name, value in options.items() if value is not None}


def checked(values: Mapping[str, Any]) -> FitConfig:
    """Make a configuration from values, each checked by itself.

    Args:
        values: fields of `FitConfig`.

    Raises:
        ConfigError: all faults, in one line.
    """
    try:
        return FitConfig(**values)
    except PydanticError as error:
        # A list has a fault for each of its values.
        faults = dict.fromkeys(describe_fault(fault, field_names()) for fault in error.errors())
        raise ConfigError("; ".join(faults)) from None


def for_method(config: FitConfig, method: MethodName) -> FitConfig:
    """Return the same training by another method, without the options that this one does not read.

    Args:
        config: checked options.
        method: the other method.

    Raises:
        ConfigError: an option means something that the method cannot do.

    Example:
        >>> for_method(configure(max_gpu_mem="1GB", kappa=2), "exact").kappa == configure(max_gpu_mem="1GB", method="exact").kappa
        False
    """
    if method == config.method:
        return config
    other = dataclasses.replace(config, method=method)
    # Again: what goes may be all that another one is read for.
    while unread := {
        name for name, _, holds in _CONDITIONAL if holds(config) and not holds(other) and getattr(other, name) != default_of(name)
    }:
        if "unfreeze_at" in unread:
            raise ConfigError("--unfreeze-at needs --method exact")
        other = dataclasses.replace(other, **{name: default_of(name) for name in unread})
    if faults := contradictions(other):
        raise ConfigError("; ".join(faults))
    return other


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
            for name in ("weights", "lora", "freeze", "train_only", "compile")
            if getattr(config, name) not in (None, "none", (), False)
        ]
    if config.parallel_sil and config.ignore_index is not None:
        faults.append("--parallel-sil learns from the vectors of the classes, and --ignore-index leaves one out; leave one out")
    if config.visits == "interleaved" and len(config.epochs) > 1:
        faults.append("--visits interleaved trains all blocks for the same epochs; give one number of --epochs")
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
    if config.watches and config.recovery_epochs:
        faults.append(
            "--early-stop and --keep-weights best watch the epochs of --method exact or backprop, and --recovery-epochs adds others"
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


def _absolute(name: str, value: Any) -> Any:
    """Return an option's value with its path in full."""
    if name == "data_root":
        return _full(value)
    if name == "weights":
        return value if value in ("", "default", "none") or str(value).startswith("python:") else str(_full(value))
    if name == "tokenizer":
        return value if str(value) in ("", "bytes") else str(_full(value))
    if name not in CODE_FIELDS or not isinstance(value, str):
        return value
    kind, colon, path = value.partition(":")
    if name not in ("model", "loss") and kind in _FILE_KINDS and path:
        return f"{kind}:{_full(path)}"
    if name == "model" and kind == "hf":
        return value if (place := place_of(value)) is None else f"{kind}:{_full(place)}"
    if kind == "hfdata" and path:
        # A folder, or else a name on the hub.
        return f"{kind}:{_full(path)}" if _full(path).is_dir() else value
    file, colon, factory = value.rpartition(":")
    return f"{_full(file)}{colon}{factory}" if file.endswith(".py") else value


def _full(path: str | Path) -> Path:
    # A user who is not known has no home: then `~name` is a folder's name, and will not be found.
    with suppress(RuntimeError):
        path = Path(path).expanduser()
    return Path(path).absolute()
