"""Options of the commands: one for each field of `FitConfig`, in groups by what they are about."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from lowmem_pnn.config.faults import as_typed, flag
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.memory.available import budget_of, is_share, may_be_gpu
from lowmem_pnn.run.ranks import Rank
from lowmem_pnn.settings.config_file import read_config_file, read_settings
from lowmem_pnn.settings.model_arguments import parse_model_arguments

_Command = TypeVar("_Command", bound=Callable[..., Any])

GROUPS: dict[str, tuple[str, ...]] = {
    "Model": ("model", "model_arg", "precision", "tf32", "channels_last", "compile", "compare"),
    "Fine-tuning": (
        "weights", "freeze", "train_only", "freeze_norm", "unfreeze_at", "cache_frozen", "lora", "modules_to_save", "frozen_dtype",
        "weights_dtype",
    ),
    "Data": (
        "data", "target", "val_data", "test_data", "data_root", "image_size", "resize", "normalize", "augment", "mixup", "cutmix", "workers",
        "shuffle", "drop_last", "val_fraction", "test_fraction", "train_limit", "test_limit", "skip_broken",
    ),
    "Text": ("tokenizer", "context", "target_context", "pack", "loss_on", "sample", "sample_tokens"),
    "Task": ("task", "loss", "class_weights", "label_smoothing", "ignore_index"),
    "Method": (
        "method", "epochs", "max_steps", "early_stop", "keep_weights", "keep_state", "monitor", "eval_every", "time_limit", "partitions", "cuts",
        "recovery_epochs", "recover",
    ),
    "Method pnn": ("kappa", "sil", "sil_target", "parallel_sil"),
    "Method neuroflux": (
        "heads", "local_loss", "blocks", "block_tolerance", "visits", "macro_batches", "views", "exit_tolerance",
    ),
    "Method incubate": ("meta_epochs",),
    "Optimisation": (
        "batch_size", "optimizer", "lr", "lr_for", "lr_schedule", "warmup_steps", "min_lr", "momentum", "betas", "eps", "weight_decay",
        "no_decay", "no_decay_norms", "clip_norm", "fused", "seed",
    ),
    "Budget": (
        "max_gpu_mem", "budgets", "gpu", "device", "budget_scope", "max_host_mem", "host_tier", "max_disk", "drive_tbw", "plan_for",
        "micro_batch",
        "batch_norm", "loss_chunk", "recompute", "step_in_backward", "optimizer_state", "activation_dtype", "no_timing",
    ),
    "Contenders": ("methods", "baselines", "steps"),
    "Files of options": ("config_file", "settings", "print_config"),
    "Output": (
        "workdir", "resume", "trust", "overwrite", "commit_every", "keep_commits", "log_every", "logger", "no_report", "csv_file", "html_file",
        "svg_file", "as_json", "quiet", "debug",
        "help", "_click_default_help",  # the name differs between versions of click
    ),
}  # fmt: skip
"""Headings of `fit --help`, and the options under each."""

_DEVICES = "auto|cpu|cuda"
# What an option's value is called in the help; shells complete the words of it.
_METAVARS = {
    "max_gpu_mem": "SIZE|X%|auto", "max_host_mem": "SIZE", "max_disk": "SIZE", "drive_tbw": "TB", "model_arg": "KEY=VALUE", "data_root": "DIR",
    "cuts": "LAYER,...", "epochs": "N,...", "batch_size": "N,...|auto", "lr": "X,...", "shuffle": "yes|no,...", "kappa": "X,...",
    "model": "NAME", "data": "NAME", "device": _DEVICES, "partitions": "N", "micro_batch": "N", "seed": "N", "keep_commits": "N",
    "train_limit": "N", "test_limit": "N", "momentum": "X", "weight_decay": "X", "val_fraction": "X", "commit_every": "SECONDS",
    "method": "pnn|neuroflux|incubate|exact|backprop", "optimizer": "sgd|adam|adamw,...", "sil": "uniform|normal|orthogonal|sparse",
    "visits": "sequential|interleaved|laps=L", "macro_batches": "N", "views": "N", "augment": "none|basic|randaugment|trivial",
    "blocks": "planner|alike",
    "block_tolerance": "X", "exit_tolerance": "X", "heads": "adaptive|classic|auglocal|linear", "sil_target": "full|pooled",
    "budget_scope": "process|allocator", "lr_schedule": "constant|linear|cosine|onecycle", "warmup_steps": "N", "clip_norm": "X",
    "label_smoothing": "X", "loss_chunk": "N", "recovery_epochs": "N", "activation_dtype": "float32|bfloat16|float16|int8",
    "recover": "N,...|all", "log_every": "N",
    "logger": "none|tensorboard|wandb|mlflow", "precision": "fp32|bf16|fp16", "optimizer_state": "fp32|bf16|int8",
    "recompute": "auto|always|never",
    "plan_for": "auto|size|time", "batch_norm": "micro|refuse", "task": "auto|classification|multilabel|regression|segmentation|...",
    "early_stop": "N", "keep_weights": "last|best", "monitor": "NAME", "eval_every": "STEPS", "time_limit": "TIME",
    "loss": "NAME", "class_weights": "X,...|balanced", "ignore_index": "N", "val_data": "NAME", "test_data": "NAME",
    "image_size": "N|HxW", "resize": "crop|squash|pad", "normalize": "none|imagenet|auto|MEAN/STD", "workers": "N",
    "test_fraction": "X", "weights": "default|FILE|DIR|none", "freeze": "PATTERN,...", "train_only": "PATTERN,...",
    "target": "COLUMN,...", "mixup": "X", "cutmix": "X",
    "lr_for": "PATTERN=X", "unfreeze_at": "EPOCH", "tokenizer": "DIR|FILE|bytes",
    "context": "N", "target_context": "N", "loss_on": "completions|all",
    "sample": "TEXT", "sample_tokens": "N",
    "meta_epochs": "N", "local_loss": "cross-entropy|similarity|both",
    "betas": "A,B", "eps": "X", "no_decay": "PATTERN,...", "min_lr": "X", "max_steps": "N",
    "lora": "KEY=VALUE,...", "modules_to_save": "NAME,...", "frozen_dtype": "fp32|bf16|int8|nf4", "weights_dtype": "fp32|bf16",
}  # fmt: skip

# Options without a value, and what they are by default where they can be turned off, too.
_SWITCHES = {
    "fused": "fused", "step_in_backward": "step-in-backward", "compare": "compare", "parallel_sil": "", "host_tier": "host-tier", "tf32": "",
    "channels_last": "", "skip_broken": "", "drop_last": "", "compile": "", "freeze_norm": "", "pack": "", "keep_state": "",
    "no_decay_norms": "decay-norms; of pretrained language models no-decay-norms", "cache_frozen": "cache-frozen",
}  # fmt: skip


# Options that most commands are typed with; `--help-all` lists the others, too.
_COMMON = (
    "model", "data", "target", "image_size", "augment", "weights", "freeze", "lora", "tokenizer", "context", "method", "epochs", "batch_size",
    "optimizer", "lr", "lr_schedule", "max_gpu_mem", "budgets", "device", "precision", "no_timing", "methods", "baselines", "steps",
    "config_file", "settings", "print_config", "workdir", "resume", "overwrite", "csv_file", "html_file", "svg_file", "as_json", "quiet", "help",
    "_click_default_help",
)  # fmt: skip
_ALL = "lowmem_pnn.help_all"


def _show_all(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


class GroupedCommand(click.Command):
    """A command whose help lists its options by group: the common ones, and with --help-all all of them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.append(
            click.Option(
                ["--help-all"], is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help="Show all options."
            )
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write a section for each group that the command has options of."""
        params = self.get_params(ctx)
        records = {param.name: record for param in params if (record := param.get_help_record(ctx)) is not None}
        shown = {name: record for name, record in records.items() if ctx.meta.get(_ALL) or name in _COMMON}
        grouped = {name for names in GROUPS.values() for name in names}
        # An option that is in no group yet must not be missing from the help.
        others = [name for name in shown if name not in grouped and name != "help_all"]
        for title, names in (*GROUPS.items(), ("Other", others)):
            if rows := [shown[name] for name in names if name in shown]:
                with formatter.section(title):
                    formatter.write_dl(rows)
        if more := len(records) - len(shown) - ("help_all" not in shown):
            formatter.write_paragraph()
            formatter.write_text(f"{more} more options: {ctx.command_path} --help-all")


def config_options(command: _Command, *, unread: Collection[str] = (), decided: Collection[str] = ()) -> _Command:
    """Add an option for each field of `FitConfig`, and those that give others; values stay text, which `configure` reads and checks.

    Args:
        command: the command.
        unread: fields that the command refuses, which its help leaves out.
        decided: fields for which the command has other defaults, which its help leaves out.
    """
    command = file_options(command)
    for field in reversed(dataclasses.fields(FitConfig)):
        info: Any = field.default  # pydantic's, with description and default
        text = info.description
        if field.name in _SWITCHES:
            names, default = flag(field.name), _SWITCHES[field.name]
            if default:
                names += "/" + flag(field.name, off=True)
                text += f" [default: {default}]"
            command = click.option(names, field.name, is_flag=True, default=None, help=text, hidden=field.name in unread)(command)
            continue
        default_value = None if info.is_required() else info.get_default(call_default_factory=True)
        if default_value not in (None, {}) and field.name not in decided:
            text += f" [default: {as_typed(default_value)}]"
        command = click.option(
            flag(field.name),
            field.name,
            metavar=_METAVARS[field.name],
            multiple=field.name in ("model_arg", "lr_for", "sample"),
            help=text,
            hidden=field.name in unread,
        )(command)
    return command


def file_options(command: _Command) -> _Command:
    """Add the options that give other options: a file, and texts."""
    for option in (
        click.option(
            "--set", "settings", metavar="KEY=VALUE", multiple=True, help="An option, over that in --config; may be repeated."
        ),
        click.option(
            "--config",
            "config_file",
            metavar="FILE",
            type=click.Path(path_type=Path),
            help="TOML with options, such as a run's config.toml; options on the command line count before it.",
        ),
    ):
        command = option(command)
    return command


def run_options(command: _Command) -> _Command:
    """Add the options that say which run a command begins or goes on with."""
    folder = click.Path(readable=False, path_type=Path)
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace the run in --workdir; what else lies there stays."),
        trust_option,
        click.option(
            "--resume",
            is_flag=True,
            help=(
                "Go on with a run from its last commit: the one in --workdir, else the only unfinished run under runs/ that was begun "
                "with the same options. Options may be given as before, or left out."
            ),
        ),
        click.option("--workdir", type=folder, metavar="DIR", help="Folder of the run. [default: runs/MODEL-METHOD-N]"),
    ):
        command = option(command)
    return command


def trust_option(command: _Command) -> _Command:
    """Add the option that lets a command run code that only the run names."""
    return click.option(
        "--trust",
        is_flag=True,
        help="Run the code that the run names for its model or data, though this command does not name it.",
    )(command)


def place_options(command: _Command) -> _Command:
    """Add the options that say where a command uses a trained model, which may be another place than that of the training."""
    for option in (
        click.option("--device", metavar=_DEVICES, help="Device: cpu, cuda, cuda:INDEX or auto. [default: the run's]"),
        click.option("--max-gpu-mem", metavar="SIZE|X%|auto", help="Memory budget of the device. [default: the run's]"),
    ):
        command = option(command)
    return command


def output_options(command: _Command) -> _Command:
    """Add the options that say what a command prints."""
    for option in (
        click.option("--debug", is_flag=True, help="On a failure, show the traceback too."),
        click.option("--quiet", is_flag=True, help="Show no progress."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout, and nothing else there."),
    ):
        command = option(command)
    return command


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given: on the command line, before it by --set, before that in a file.

    What is given later takes the place of what was given before, but arguments of the model's factory are taken one by one.

    Args:
        options: fields of `FitConfig`, and those of `file_options`, as click gives them.

    Raises:
        ConfigError: a model's argument that is not KEY=VALUE, or a key that is no option.
    """
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if "model_arg" in given:
        given["model_arg"] = parse_model_arguments(given["model_arg"])
    file, settings = given.pop("config_file", None), given.pop("settings", ())
    ways = [read_config_file(file) if file is not None else {}, read_settings(settings), given]
    merged = {name: value for way in ways for name, value in way.items()}
    arguments = [way["model_arg"] for way in ways if "model_arg" in way]
    # A file may give anything, which is refused later.
    if len(arguments) > 1 and all(isinstance(each, Mapping) for each in arguments):
        merged["model_arg"] = {name: value for each in arguments for name, value in each.items()}
    return merged


def typed_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given in the command itself, and not in a file that it names.

    Args:
        options: as for `given_options`.
    """
    return given_options({**options, "config_file": None})


def command_options(options: dict[str, Any], budgets: Sequence[int] = ()) -> dict[str, Any]:
    """Return the options that were on the command line, of a command that needs a budget; a share of what is free is in bytes then.

    Args:
        options: fields of `FitConfig`, as click gives them.
        budgets: budgets that may be given in place of the one option, in bytes.

    Raises:
        click.UsageError: the budget is missing.
        ConfigError: a model's argument that is not KEY=VALUE.
    """
    given = given_options(options)
    if budgets:
        given["max_gpu_mem"] = max(budgets)
    if "max_gpu_mem" not in given:
        raise click.UsageError("--max-gpu-mem is missing; give --max-gpu-mem 2GB", click.get_current_context())
    # A file may give anything, which is refused later.
    budget, device = given["max_gpu_mem"], str(given.get("device") or "auto")
    if is_share(budget) and may_be_gpu(device):
        from lowmem_pnn.device.support import budget_on  # with torch, which takes a second to import

        return {**given, "max_gpu_mem": budget_on(device, budget, Rank.of_environment().local)}
    return {**given, "max_gpu_mem": budget_of(budget)}
