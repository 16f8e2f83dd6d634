"""Defaults that depend on what is trained: from random or pretrained weights, on language or on anything else."""

from collections.abc import Mapping
from typing import Any

from lowmem_pnn.config.faults import as_typed
from lowmem_pnn.config.finetuning_options import DEFAULTS_WITH_WEIGHTS
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.language_options import LANGUAGE_KINDS
from lowmem_pnn.config.transformers_place import TRANSFORMERS_TASKS, is_about_text, is_on_hub

# What Hugging Face's trainers take for such models (transformers' TrainingArguments, TRL's SFTConfig), but for clipping theirs alike.
_FINE_TUNING_LANGUAGE: Mapping[str, Any] = {
    "lr": (2e-5,), "lr_schedule": "linear", "weight_decay": 0.0, "clip_norm": 1.0,
}  # fmt: skip

_TASKS_OF_TEXT = tuple(task for task in TRANSFORMERS_TASKS if task != "image-classification")
# Kinds of data that no model of tokens takes; neither does it those that have a name alone.
_NO_TEXT = ("imagefolder", "segmentation", "csv")


def training_defaults(*, pretrained: bool, language: bool, transformers: bool = False) -> dict[str, Any]:
    """Return the options of a training that nobody gave, where they are not those of `FitConfig`.

    Args:
        pretrained: Whether training begins with pretrained weights.
        language: Whether the model is one of tokens.
        transformers: Whether it is one of transformers.

    Example:
        >>> training_defaults(pretrained=True, language=False)
        {'method': 'exact', 'epochs': (3,)}
    """
    if not pretrained:
        return {"method": "exact"} if transformers else {}
    return {**DEFAULTS_WITH_WEIGHTS, **(_FINE_TUNING_LANGUAGE if language else {})}


def training_facts(config: FitConfig) -> dict[str, Any]:
    """Return by what a run trains, as `result.json` has it.

    Args:
        config: options of the run.
    """
    names = ["optimizer", "lr", "lr_schedule", "warmup_steps", "min_lr", "weight_decay", "clip_norm", "max_steps"]
    if config.recovery_epochs:
        names.append("recovery_epochs")
    if "sgd" not in config.optimizer:
        names += ["betas", "eps"]
    if config.weights_dtype != "fp32":
        names.append("weights_dtype")
    if config.weight_decay:
        names += ["no_decay", "no_decay_norms"]
    values = {name: getattr(config, name) for name in names}
    # Lists, as they come back from JSON.
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {
        name: value[0] if isinstance(value, list) and len(value) == 1 and name in ("optimizer", "lr") else value
        for name, value in lists.items()
    }


def training_words(config: FitConfig) -> str:
    """Say by what a run trains, in a line.

    Args:
        config: options of the run.

    Example:
        >>> training_words(FitConfig(max_gpu_mem="1GB", model="mlp:64-10", data="digits", lr="2e-5", clip_norm=1))
        'pnn, 10 epochs, adamw, lr 2e-05 constant, weight decay 0, clipping at 1'
    """
    steps = "" if config.max_steps is None else f" or {config.max_steps:,} steps"
    clipping = "no clipping" if config.clip_norm is None else f"clipping at {config.clip_norm:g}"
    return (
        f"{config.method}, {as_typed(config.epochs)} epochs{steps}, {as_typed(config.optimizer)}, lr {as_typed(config.lr)} "
        f"{config.lr_schedule}, weight decay {config.weight_decay:g}, {clipping}"
    )


def unasked_method(config: FitConfig, given: Mapping[str, Any]) -> str | None:
    """Say by which method a training goes where none was asked for, since it is not the ordinary one; else None.

    Args:
        config: options of the run.
        given: fields of `FitConfig` that were given; None means not given.

    Example:
        >>> given = {"max_gpu_mem": "1GB", "model": "mlp:64-10", "data": "digits"}
        >>> unasked_method(FitConfig(**given), given)
        'no method was asked for, so it is pnn: partitions learn one after the other, all but the last from random labels of their own; \
ordinary training, as in plain PyTorch, is --method exact'
    """
    if given.get("method") is not None or config.method != "pnn" or (given.get("model") is None and given.get("data") is None):
        return None
    return (
        "no method was asked for, so it is pnn: partitions learn one after the other, all but the last from random labels of their own; "
        "ordinary training, as in plain PyTorch, is --method exact"
    )


def is_language(options: Mapping[str, Any]) -> bool:
    """Decide whether options, as they were given, are about a model of tokens.

    Args:
        options: fields of `FitConfig`.
    """
    model, kind = str(options.get("model", "")), str(options.get("data", "")).partition(":")[0]
    is_said = kind in LANGUAGE_KINDS or options.get("tokenizer") is not None or is_about_text(model)
    return is_said or (is_on_hub(model) and options.get("task") in _TASKS_OF_TEXT)


def undecided(options: Mapping[str, Any]) -> str | None:
    """Return the fault of options whose defaults depend on whether a model on the hub is one of tokens, where nothing tells; else None.

    Args:
        options: fields of `FitConfig`, as they were given, of a training that begins with pretrained weights.

    Example:
        >>> undecided({"model": "hf:someone/model", "data": "text:book.txt"}) is None
        True
    """
    model, data = str(options.get("model", "")), str(options.get("data", ""))
    is_told = is_language(options) or options.get("task", "auto") != "auto" or ":" not in data or data.startswith(_NO_TEXT)
    if is_told or not is_on_hub(model) or all(name in options for name in _FINE_TUNING_LANGUAGE):
        return None
    return (
        f"--model {model}: whether it is one of text is not known before it is fetched, and the defaults of --lr, --lr-schedule, "
        "--weight-decay and --clip-norm depend on that; give --task, such as causal-lm or image-classification, or all four of them"
    )
