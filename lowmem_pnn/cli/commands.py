"""The command line: options from `FitConfig`, one place that turns errors into exit codes. torch is imported only when work starts."""

import contextlib
import dataclasses
import gc
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from lowmem_pnn import __version__
from lowmem_pnn.cli.supervisor import STOP_SIGNALS, as_worker, is_worker, supervise
from lowmem_pnn.config.fit_config import FitConfig, flag
from lowmem_pnn.config.options import configure, next_workdir
from lowmem_pnn.errors import BudgetError, ConfigError, LowMemError
from lowmem_pnn.run.ranks import Rank

_Command = TypeVar("_Command", bound=Callable[..., Any])

# What an option's value is called in the help.
_METAVARS = {
    "max_gpu_mem": "SIZE", "max_host_mem": "SIZE", "max_disk": "SIZE", "model_arg": "KEY=VALUE", "data_root": "DIR",
    "cuts": "LAYER,...", "epochs": "N,...", "batch_size": "N,...|auto", "lr": "X,...", "shuffle": "yes|no,...", "kappa": "X,...",
    "model": "NAME", "data": "NAME", "device": "NAME", "partitions": "N", "micro_batch": "N", "seed": "N", "keep_commits": "N",
    "train_limit": "N", "test_limit": "N", "momentum": "X", "weight_decay": "X", "val_fraction": "X", "commit_every": "SECONDS",
    "method": "pnn|neuroflux|exact|backprop", "optimizer": "sgd|adam|adamw,...", "sil": "uniform|normal|orthogonal|sparse",
    "visits": "sequential|interleaved|laps=L", "macro_batches": "N", "views": "N", "augment": "none|basic", "blocks": "planner|alike",
    "block_tolerance": "X", "exit_tolerance": "X", "heads": "adaptive|classic|auglocal|linear", "sil_target": "full|pooled",
    "budget_scope": "process|allocator", "lr_schedule": "constant|cosine|onecycle", "warmup_steps": "N", "clip_norm": "X",
    "label_smoothing": "X", "loss_chunk": "N", "recovery_epochs": "N", "activation_dtype": "float32|bfloat16|float16|int8",
    "recover": "N,...|all", "log_every": "N", "precision": "fp32|bf16|fp16", "optimizer_state": "fp32|bf16|int8",
    "plan_for": "auto|size|time",
}  # fmt: skip


# Options without a value: their names, and what the help says of the default.
_SWITCHES = {
    "fused": ("--fused/--no-fused", " [default: fused]"),
    "step_in_backward": ("--step-in-backward/--no-step-in-backward", " [default: step-in-backward]"),
    "parallel_sil": ("--parallel-sil", ""),
    "channels_last": ("--channels-last", ""),
    "compile": ("--compile", ""),
}


def _config_options(command: _Command) -> _Command:
    """Add an option for each field of `FitConfig`; values stay text, which `configure` reads and checks."""
    for field in reversed(dataclasses.fields(FitConfig)):
        info: Any = field.default  # pydantic's, with description and default
        text = info.description
        if field.name in _SWITCHES:
            names, default = _SWITCHES[field.name]
            command = click.option(names, field.name, is_flag=True, default=None, help=text + default)(command)
            continue
        if (default := _default_text(info.get_default(call_default_factory=True))) and not info.is_required():
            text += f" [default: {default}]"
        command = click.option(
            flag(field.name),
            field.name,
            metavar=_METAVARS[field.name],
            multiple=field.name == "model_arg",
            help=text,
        )(command)
    return command


def _default_text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_default_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == {}:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


_output_options: list[Callable[[Any], Any]] = [
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout, and nothing else there."),
    click.option("--quiet", is_flag=True, help="No progress."),
    click.option("--debug", is_flag=True, help="On a failure, show the traceback too."),
]


def _outputs(command: _Command) -> _Command:
    for option in reversed(_output_options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 130})
@click.version_option(__version__, prog_name="lowmem-pnn")
def cli() -> None:
    """Train networks larger than your device's memory: one partition at a time, inside a byte budget that is enforced.

    Try it: lowmem-pnn fit --max-gpu-mem 2GB

    Exit codes: 0 done; 1 a fault of ours; 2 usage; 3 configuration, model or data not usable; 4 cannot fit in the budget; 5 disk;
    6 checkpoint damaged or not of this run; 7 diverged; 8 run directory in use; 75 stopped, can be resumed; 130, 143 second signal.
    """


@cli.command()
@_config_options
@click.option(
    "--workdir", type=click.Path(path_type=Path), metavar="DIR", help="The run's folder. [default: runs/MODEL-METHOD-N]"
)
@click.option("--resume", is_flag=True, help="Go on with the run in --workdir from its last commit; needs no other option.")
@click.option("--overwrite", is_flag=True, help="Replace the run that is in --workdir.")
@_outputs
@click.option("--after-crash", is_flag=True, hidden=True)
def fit(
    workdir: Path | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    after_crash: bool,
    **given: Any,
) -> None:
    """Train a model within a memory budget.

    With neither --model nor --data: a multilayer perceptron with 2.16 GB of training state, on scikit-learn's digits.
    """
    config, rank = None, Rank.of_environment()
    if resume:
        chosen = rank.folder(_check_resume(workdir, overwrite, given))
    else:
        config = configure(**_given(given))
        rank.check(config)
        if workdir is None and not rank.is_alone:
            raise ConfigError("the processes of torchrun need a folder that they agree on; give --workdir DIR")
        chosen = rank.folder(workdir or next_workdir(config))
    if not is_worker():
        arguments = sys.argv[1:] if workdir is not None else [*sys.argv[1:], "--workdir", str(chosen)]
        raise SystemExit(supervise(arguments, chosen))
    with _stop_on_signals() as should_stop, _stdout_is_ours():
        from rich.console import Console

        from lowmem_pnn.api import resume_run, start_run
        from lowmem_pnn.reporting.progress import Display, TerminalDisplay

        display = Display() if quiet else TerminalDisplay(Console(stderr=True))
        if config is None:
            result = resume_run(chosen, display=display, should_stop=should_stop, after_crash=after_crash, rank=rank)
        else:
            result = start_run(config, chosen, overwrite=overwrite, display=display, should_stop=should_stop, rank=rank)
    if result is not None:
        click.echo(result.to_json() if as_json else str(result))


@cli.command()
@_config_options
@click.option(
    "--no-timing", is_flag=True, help="Run no layers, which takes a few seconds: no predicted times, and the asked method alone."
)
@_outputs
def plan(no_timing: bool, as_json: bool, quiet: bool, debug: bool, **given: Any) -> None:
    """Show what `fit` with the same options would do: partitions, micro-batches, predicted peaks, disk; and what an epoch of each
    method would take. Nothing is trained.
    """
    config = configure(**_given(given))
    if not no_timing:
        as_worker()
    with _stdout_is_ours():
        from lowmem_pnn.api import plan_run

        report = plan_run(config, timing=not no_timing)
    click.echo(report.to_json() if as_json else str(report))
    # The interpreter would look through all that was imported for cycles once more before it ends: half a second.
    gc.freeze()
    raise SystemExit(report.exit_code)


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@_outputs
def evaluate(run: Path, as_json: bool, quiet: bool, debug: bool) -> None:
    """Measure the weights of a finished run on its test data, within its memory budget."""
    import json

    with _stdout_is_ours():
        from lowmem_pnn.api import evaluate as evaluate_run

        scores = evaluate_run(run)
    click.echo(json.dumps(scores) if as_json else ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--exit", "exit_", metavar="auto|K", default="auto", help="Where the model ends: exit K, from 1; auto: as chosen by the run."
)
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the model. [default: RUN/exit-K]")
@_outputs
def export(run: Path, exit_: str, out: Path | None, as_json: bool, quiet: bool, debug: bool) -> None:
    """Write the model of a finished run, up to one of its exits, for plain PyTorch: a torch.export program, and its weights."""
    import json

    with _stdout_is_ours():
        from lowmem_pnn.api import export as export_run

        report = export_run(run, exit=exit_, out=out)
    click.echo(json.dumps(report) if as_json else "\n".join(f"{name}: {value}" for name, value in report.items()))


def main() -> None:
    """Run the command line and exit: the one place where errors become exit codes."""
    debug = "--debug" in sys.argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that has no letter for something is no reason to fail at the end of a run.
        sys.stdout.reconfigure(errors="replace")
    try:
        cli.main(prog_name="lowmem-pnn", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        command = context.command_path if context is not None else "lowmem-pnn"
        text = error.format_message().rstrip(".").replace(". ", "; ")
        print(f"lowmem-pnn: {text[:1].lower()}{text[1:]}; {command} --help lists what there is", file=sys.stderr)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("lowmem-pnn: stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has left; Python would complain once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except LowMemError as error:
        if debug:
            traceback.print_exc()
        print(f"lowmem-pnn: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        code, text = _judge(error, text)
        print(f"lowmem-pnn: {text}; run again with --debug for the traceback", file=sys.stderr)
        sys.exit(code)


def _judge(error: Exception, text: str) -> tuple[int, str]:
    """Exit code and words for an exception that nobody foresaw where it was raised."""
    # Not at the top: it imports torch, which is there by now if memory ran out.
    from lowmem_pnn.device import is_out_of_memory

    if is_out_of_memory(error):
        return BudgetError.exit_code, f"out of memory outside of training ({text}); give a larger --max-gpu-mem"
    return 1, f"a fault of its own: {text}"


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were on the command line; repeated KEY=VALUE texts as one dictionary."""
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if "max_gpu_mem" not in given:
        raise click.UsageError("--max-gpu-mem is missing; give --max-gpu-mem 2GB", click.get_current_context())
    if "model_arg" in given:
        # Not at the top: it imports torch.
        from lowmem_pnn.sources.models import parse_model_arguments

        given["model_arg"] = parse_model_arguments(given["model_arg"])
    return given


def _check_resume(workdir: Path | None, overwrite: bool, options: dict[str, Any]) -> Path:
    if workdir is None:
        raise ConfigError("--resume needs the run to go on with; give --workdir DIR")
    others = [flag(name) for name, value in options.items() if value is not None and value != ()]
    if overwrite:
        others.append("--overwrite")
    if others:
        raise ConfigError(
            f"{', '.join(others)} with --resume would change the run, which goes on with the configuration in --workdir; "
            f"leave {'it' if len(others) == 1 else 'them'} out"
        )
    return workdir


@contextlib.contextmanager
def _stdout_is_ours() -> Iterator[None]:
    """What a user's model or data set prints goes to standard error: standard output is the result's alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Note the first SIGINT or SIGTERM, for the run to stop at a good place; the second ends the process at once."""
    caught: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)
        # Not print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, b"lowmem-pnn: stopping after this batch; once more to stop at once\n")

    before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    # The supervisor starts its worker with these blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
