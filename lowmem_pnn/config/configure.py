"""The configuration of a run, made from what a user gave: defaults, checks, and options that exclude each other."""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError as PydanticError

from lowmem_pnn.config.adapter_options import DEFAULTS_WITH_ADAPTERS
from lowmem_pnn.config.checks import contradictions, useless_at_the_beginning
from lowmem_pnn.config.code import BUILT_IN, CODE_FIELDS
from lowmem_pnn.config.defaults import is_language, training_defaults, undecided
from lowmem_pnn.config.faults import describe_fault, flag
from lowmem_pnn.config.fit_config import FitConfig, MethodName, default_of, field_names
from lowmem_pnn.config.language_options import LANGUAGE_KINDS, ROWS_OF_TEXT
from lowmem_pnn.config.transformers_place import has_weights, is_transformers, place_of, unread_weights
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

# What learns the model's own task at last, and all together, so that a validation tells whether it is to end there.
_WATCHABLE = "--method pnn, exact or backprop, or incubate with --recovery-epochs"

# Options that only some choice of another option reads: (option, what it needs, does this run have it?).
_CONDITIONAL: tuple[tuple[str, str, Callable[[FitConfig], bool]], ...] = (
    ("kappa", "--method pnn", lambda config: config.method == "pnn"),
    ("sil", "--method pnn", lambda config: config.method == "pnn"),
    ("sil_target", "--method pnn", lambda config: config.method == "pnn"),
    ("visits", "--method neuroflux", lambda config: config.method == "neuroflux"),
    ("macro_batches", "--visits interleaved", lambda config: config.visits == "interleaved"),
    ("views", "--augment", lambda config: config.augment != "none"),
    ("drop_last", "one --batch-size", lambda config: config.batch_size != "auto" and len(config.batch_size) == 1),
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
    ("unfreeze_at", "--method exact or backprop", lambda config: config.method in ("exact", "backprop")),
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
    ("early_stop", _WATCHABLE, lambda config: _can_be_watched(config)),
    ("keep_weights", _WATCHABLE, lambda config: _can_be_watched(config)),
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


def _can_be_watched(config: FitConfig) -> bool:
    return config.method in ("pnn", "exact", "backprop") or (config.method == "incubate" and config.recovery_epochs > 0)


# Options that so many others depend on that nothing is said of these where one of them is at fault.
_DECIDING = {"max_gpu_mem", "model", "data", "method", "device", "optimizer"}


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
    try:
        config = with_defaults(given)
    except ConfigError as error:
        if others := _faults_beside(error.options, given):
            raise ConfigError("; ".join([str(error), *others])) from None
        raise
    size = given["max_gpu_mem"]
    # A number from Python is bytes, but nobody means a few.
    has_no_unit = size.strip().isdigit() if isinstance(size, str) else isinstance(size, int) and size < 1000
    if config.max_gpu_mem < MEGABYTE and has_no_unit:
        raise UnitError(f"--max-gpu-mem {size} is {size} bytes; did you mean {size}GB?")
    if faults := _faults_together(config, given):
        raise ConfigError("; ".join(faults))
    return config


def _faults_together(config: FitConfig, given: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with options that are right each by itself."""
    faults = [f"{flag(name)} has no effect here: it needs {need}" for name, need in unmet(config, given)]
    return faults + contradictions(config) + useless_at_the_beginning(config)


def _faults_beside(faulty: Collection[str], given: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with other options than those whose values are at fault, as far as it does not depend on these."""
    if not faulty or _DECIDING & set(faulty):
        return []
    left = {name: value for name, value in given.items() if name not in faulty}
    with suppress(ConfigError):
        named = re.compile(rf"({'|'.join(map(flag, faulty))})(?![\w-])")
        return [fault for fault in _faults_together(with_defaults(left), left) if named.search(fault) is None]
    return []


def faults_of(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with values of some options, each by itself.

    Args:
        values: fields of `FitConfig`; those that are missing are no fault.
    """
    try:
        checked({**DEMONSTRATION, "max_gpu_mem": "1GB", **values})
    except ConfigError as error:
        return [str(error)]
    return []


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
    elif "weights" not in given and (file := unread_weights(model)) is not None:
        raise ConfigError(
            f"--model {model}: of the weights in that folder none are read ({file}); give a folder with model.safetensors, or --weights none "
            "for random values"
        )
    pretrained = values.get("weights") not in (None, "none")
    if pretrained and (fault := undecided(values)) is not None:
        raise ConfigError(fault)
    defaults = training_defaults(pretrained=pretrained, language=is_language(values), transformers=is_transformers(model))
    values = {**defaults, **values}
    if given.get("lora") is not None:
        values = {**values, **DEFAULTS_WITH_ADAPTERS, **given}
    config = checked(values)
    is_told = given.get("no_decay_norms") is not None or given.get("no_decay") is not None
    if pretrained and is_language(values) and config.weight_decay > 0 and not is_told:
        return dataclasses.replace(config, no_decay_norms=True)
    return config


def unmet(config: FitConfig, given: Collection[str]) -> list[tuple[str, str]]:
    """Return the options that were given and are not read, each with what it needs.

    Args:
        config: options, each checked by itself.
        given: names of those that were given.
    """
    return [(name, need) for name, need, holds in _CONDITIONAL if name in given and not holds(config)]


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, paths in full: a run may be resumed from another folder than it was begun in.

    Names that are known have their own letters: `ResNet18`, `CIFAR10` and `Exact` are `resnet18`, `cifar10` and `exact`.

    Args:
        options: fields of `FitConfig`; None means not given.
    """
    return {name: _absolute(name, _in_own_letters(name, value)) for name, value in options.items() if value is not None}


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
        raise ConfigError("; ".join(faults), frozenset(str(fault["loc"][0]) for fault in error.errors())) from None


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
            raise ConfigError("--unfreeze-at needs --method exact or backprop")
        other = dataclasses.replace(other, **{name: default_of(name) for name in unread})
    if faults := contradictions(other):
        raise ConfigError("; ".join(faults))
    return other


def _in_own_letters(name: str, value: Any) -> Any:
    """Return an option's value, the names of models, data and methods in it in small letters, as all of them are."""
    if not isinstance(value, str) or name not in ("method", "model", "data", "val_data", "test_data"):
        return value
    kind, colon, rest = value.partition(":")
    if colon:
        return f"{kind.lower()}:{rest}" if kind.lower() in BUILT_IN.get(name, ()) else value
    if name == "model":
        is_name = re.fullmatch(r"[\w-]+", value) and not Path(value).exists()
    else:
        is_name = name == "method" or value.lower() in ("digits", *DOWNLOADED)
    return value.lower() if is_name else value


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
