"""The commands, and the one place that turns errors into exit codes. torch is imported only when work starts."""

import contextlib
import dataclasses
import gc
import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from lowmem_pnn import __version__
from lowmem_pnn.cli.bench_command import bench
from lowmem_pnn.cli.completion import completion
from lowmem_pnn.cli.doctor import doctor
from lowmem_pnn.cli.evaluate_command import evaluate
from lowmem_pnn.cli.generate_command import generate
from lowmem_pnn.cli.lists import data, methods, models
from lowmem_pnn.cli.options import (
    GroupedCommand,
    command_options,
    config_options,
    given_options,
    output_options,
    place_options,
    run_options,
    trust_option,
    typed_options,
)
from lowmem_pnn.cli.output import announce, open_standard_streams, print_result, stdout_is_ours, terminal_width
from lowmem_pnn.cli.supervisor import STOP_SIGNALS, as_worker, begin_supervisor, is_repeated_hangup, is_worker, stop_signals
from lowmem_pnn.cli.usage import usage_text
from lowmem_pnn.config.configure import configure
from lowmem_pnn.config.defaults import unasked_method
from lowmem_pnn.config.gpu_description import GpuDescription
from lowmem_pnn.config.resume import resumed_config
from lowmem_pnn.errors import BudgetError, ConfigError, DiskError, LowMemError
from lowmem_pnn.memory.available import budget_on_described, is_share
from lowmem_pnn.run.asked_run import asked_run
from lowmem_pnn.run.ranks import Rank
from lowmem_pnn.run.unfinished import options_of_run
from lowmem_pnn.settings.command import describe_command
from lowmem_pnn.settings.config_file import to_toml
from lowmem_pnn.units import parse_bytes


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 130})
@click.version_option(__version__, prog_name="lowmem-pnn")
def cli() -> None:
    """Train networks larger than your device's memory: one partition at a time, inside a byte budget that is enforced.

    Try it: lowmem-pnn fit --max-gpu-mem 2GB

    Exit codes: 0 done; 1 a fault of ours; 2 usage; 3 configuration, model or data not usable; 4 cannot fit in the budget; 5 disk;
    6 checkpoint damaged or not of this run; 7 diverged; 8 run directory in use; 75 stopped, can be resumed; 130, 143 second signal.
    """


@cli.command(cls=GroupedCommand)
@config_options
@run_options
@output_options
@click.option("--no-report", is_flag=True, help="Write no report.html, the page that `lowmem-pnn report` writes, at the end.")
@click.option("--print-config", is_flag=True, help="Print the options as TOML, as --config takes them, and train nothing.")
@click.option("--after-crash", is_flag=True, hidden=True)
@click.option("--seconds-spent", type=float, default=0.0, hidden=True)
def fit(
    workdir: Path | None,
    resume: bool,
    overwrite: bool,
    trust: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
    no_report: bool,
    print_config: bool,
    after_crash: bool,
    seconds_spent: float,
    **options: Any,
) -> None:
    """Train a model within a memory budget.

    With neither --model nor --data: a multilayer perceptron with 2.16 GB of training state, on scikit-learn's digits.

    \b
    lowmem-pnn fit --max-gpu-mem 1G --model resnet18 --data imagefolder:photos --image-size 160 --epochs 5
    lowmem-pnn fit --max-gpu-mem 75% --method exact --model net.py:build --data npz:arrays.npz
    lowmem-pnn fit --resume --workdir runs/resnet18-pnn-1
    """  # noqa: D301 - click's mark of lines that are not wrapped
    rank = Rank.of_environment()
    if trust and not resume:
        raise ConfigError("--trust has no effect here: it needs --resume; leave it out")
    if workdir is None and not rank.is_alone:
        raise ConfigError("the processes of torchrun need a folder that they agree on; give --workdir DIR")
    asked = asked_run(
        given_options(options),
        lambda: configure(**command_options(options)),
        workdir,
        resume=resume,
        overwrite=overwrite,
        rank=rank,
    )
    chosen, config = asked.folder, asked.config
    if print_config:
        print_result(to_toml(config or resumed_config(options_of_run(chosen), asked.given, chosen)).rstrip("\n"))
        return
    if not is_worker():
        if not quiet:
            announce(describe_command(config, chosen, asked.given))
        # Resolved once: of an option that is given twice the last value counts.
        budget = (
            ["--max-gpu-mem", str(config.max_gpu_mem)] if config is not None and is_share(asked.given.get("max_gpu_mem")) else []
        )
        arguments = [*sys.argv[1:], *budget, *(["--workdir", str(chosen)] if workdir is None else [])]
        begin_supervisor(arguments, chosen)
    with _stop_on_signals() as should_stop:
        with stdout_is_ours():
            from rich.console import Console

            from lowmem_pnn.reporting.progress import Display, TerminalDisplay
            from lowmem_pnn.run.process import Process
            from lowmem_pnn.training import start

            process = Process(
                display=Display() if quiet else TerminalDisplay(Console(stderr=True)),
                should_stop=should_stop,
                rank=rank,
                after_crash=after_crash,
                seconds_spent=seconds_spent,
            )
            if config is None:
                result = start.resume(chosen, asked.given, process=process, trust=trust)
            else:
                result = start.begin(config, chosen, overwrite=overwrite, process=process)
        # Signals are still only noted: a run that is done is not reported as one that was stopped.
        if result is not None:
            print_result(result.to_json() if as_json else result.describe(terminal_width()), f"it is in {chosen / 'result.json'}")


@cli.command(cls=GroupedCommand)
@config_options
@click.option(
    "--no-timing",
    is_flag=True,
    help="Do not time layers, which takes a few seconds: show no predicted times, and only the method that is asked for.",
)
@click.option("--budgets", metavar="SIZE,...", help="Several budgets, one after the other, in place of --max-gpu-mem.")
@click.option(
    "--gpu",
    metavar="SIZE,...",
    help=(
        "A GPU that is not here, to plan for: its memory, and as far as known pcie=GB/s, tflops=N (fp32), disk=GB/s, ram=SIZE, as in "
        "8GB,pcie=12,tflops=10,disk=2.5,ram=16GB. Seconds are computed, nothing is timed. The budget is all of it by default."
    ),
)
@output_options
def plan(no_timing: bool, budgets: str | None, gpu: str | None, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Show what `fit` with the same options would do: partitions, micro-batches, predicted peaks, disk; what an epoch of each method
    would take, from which budget on each fits, and which one to take. Nothing is trained.
    """
    sizes = [parse_bytes(size) for size in budgets.split(",")] if budgets else []
    if budgets and "max_gpu_mem" in typed_options(options):
        raise ConfigError("--max-gpu-mem and --budgets exclude each other; give one")
    described = None if gpu is None else GpuDescription.parse(gpu)
    if described is not None:
        given = given_options(options)
        device = given.get("device", "auto")
        options |= {"device": device, "max_gpu_mem": budget_on_described(described, device, given.get("max_gpu_mem"))}
    config = configure(**command_options(options, sizes))  # faults come before anything is imported anew
    if not no_timing:
        as_worker()
    with stdout_is_ours():
        from lowmem_pnn.preview.preview import previews
        from lowmem_pnn.reporting.budget_table import describe_budgets

        reports = previews(config, sizes or [config.max_gpu_mem], timing=not no_timing, gpu=described)
        report = reports[0]
    if not quiet and (note := unasked_method(config, given_options(options))) is not None:
        announce(note)
    if budgets:
        json_text = json.dumps({"schema_version": 1, "budgets": [dataclasses.asdict(each) for each in reports]}, indent=1)
        print_result(json_text if as_json else describe_budgets(reports, terminal_width()))
    else:
        print_result(report.to_json() if as_json else report.describe(terminal_width()))
    # The interpreter would look through all that was imported for cycles once more before it ends: half a second.
    gc.freeze()
    raise SystemExit(min(each.exit_code for each in reports))


@cli.command()
@click.argument("run", type=click.Path(readable=False, path_type=Path))
@click.option(
    "--data",
    metavar="NAME",
    help=(
        "Data to predict, with targets or without: as for fit, or a folder of images, an image, a .npz with x, a table without the target's "
        "column. [default: the run's own data]"
    ),
)
@click.option(
    "--part",
    metavar="train|val|test|all",
    help="Part of the data. [default: test, or all of data that has no test part]",
)
@click.option(
    "--out",
    required=True,
    metavar="FILE|DIR",
    help="FILE.npz: outputs, as arrays. FILE.csv: a row for each sample. DIR/: a mask for each image, as PNG.",
)
@place_options
@click.option("--skip-broken", is_flag=True, help="Leave out samples that cannot be used.")
@click.option("--overwrite", is_flag=True, help="Replace what is at --out.")
@trust_option
@output_options
def predict(
    run: Path,
    data: str | None,
    part: Any,
    out: str,
    max_gpu_mem: str | None,
    device: str | None,
    skip_broken: bool,
    overwrite: bool,
    trust: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Predict samples by the model of a finished run, within its memory budget, one partition at a time."""
    with stdout_is_ours():
        from rich.console import Console

        from lowmem_pnn.api import predict as predict_samples
        from lowmem_pnn.reporting.progress import TerminalDisplay

        report = predict_samples(
            run,
            data,
            out,
            part=part,
            max_gpu_mem=max_gpu_mem,
            device=device,
            skip_broken=skip_broken,
            overwrite=overwrite,
            trust=trust,
            display=None if quiet else TerminalDisplay(Console(stderr=True)),
        )
    text = json.dumps(report) if as_json else f"predicted {report['data']}: {report['out']}"
    print_result(text, f"the predictions are in {report['out']}")


@cli.command()
@click.argument("run", type=click.Path(readable=False, path_type=Path))
@click.option(
    "--to",
    metavar="safetensors|pt2|onnx|hf",
    help=(
        "One format, which is read again and compared: weights under the model's own names; a torch.export program; ONNX. hf: a folder that "
        "transformers loads. Only weights and hf are never whole in memory. [default: a program and its weights]"
    ),
)
@click.option(
    "--merge",
    is_flag=True,
    help="Weights as the model's own class has them: adapters (--lora) added in, frozen weights in smaller types decoded.",
)
@click.option(
    "--exit",
    "exit_",
    metavar="auto|K",
    default="auto",
    help="Exit that the model ends at, from 1; auto: the exit that the run has chosen.",
)
@click.option(
    "--out",
    type=click.Path(readable=False, path_type=Path),
    metavar="DIR",
    help="Folder that the model is written to. [default: RUN/exit-K, RUN/export, or RUN/hf]",
)
@trust_option
@output_options
def export(
    run: Path, to: Any, merge: bool, exit_: str, out: Path | None, trust: bool, as_json: bool, quiet: bool, debug: bool
) -> None:
    """Write the model of a finished run, up to one of its exits, for plain PyTorch or for others."""
    with stdout_is_ours():
        from lowmem_pnn.api import export as export_run

        report = export_run(run, to=to, merge=merge, exit=exit_, out=out, trust=trust)
    if to is not None and report["largest_difference"] is None:
        click.echo("not compared: onnxruntime is not installed; run: pip install 'lowmem-pnn[onnx]'", err=True)
    told = {name: f"{value:.1%}" if name == "val_accuracy" else value for name, value in report.items() if value is not None}
    text = json.dumps(report) if as_json else "\n".join(f"{name}: {value}" for name, value in told.items())
    print_result(text, f"the model is in {Path(report.get('file') or report['program']).parent}")


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(readable=False, path_type=Path))
@click.option(
    "--out",
    type=click.Path(readable=False, path_type=Path),
    metavar="FILE",
    help="The HTML file. [default: report.html in the run's folder; of several runs, in the current folder]",
)
@output_options
def report(runs: tuple[Path, ...], out: Path | None, as_json: bool, quiet: bool, debug: bool) -> None:
    """Write a page about a finished run: memory over time, plan, learning, where the seconds went. Several runs are set side by side."""
    from lowmem_pnn.page.page import write_page

    chosen = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    write_page(runs, chosen)
    if as_json or not quiet:
        print_result(json.dumps({"report": str(chosen)}) if as_json else f"the page is in {chosen}")


for command in (evaluate, generate, bench, doctor, models, data, methods, completion):
    cli.add_command(command)


def main() -> None:
    """Run the command line and exit: the one place where errors become exit codes."""
    debug = "--debug" in sys.argv
    open_standard_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that has no letter for something is no reason to fail at the end of a run.
        sys.stdout.reconfigure(errors="replace")
    try:
        cli.main(args=None if len(sys.argv) > 1 else ["--help"], prog_name="lowmem-pnn", standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        command = context.command_path if context is not None else "lowmem-pnn"
        _fail(f"{usage_text(error)} {command} --help lists what there is", error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _fail("stopped", 130)
    except LowMemError as error:
        if debug:
            traceback.print_exc()
        _fail(str(error), error.exit_code, getattr(error, "enough_bytes", None))
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, text = _judge(error, " ".join(f"{type(error).__name__}: {error}".split())[:300])
        _fail(f"{text}; run again with --debug for the traceback", code)


def _fail(text: str, code: int, enough_bytes: int | None = None) -> NoReturn:
    """Say in a line what went wrong, with --json as JSON on standard output too, and exit."""
    print(f"lowmem-pnn: {text}", file=sys.stderr)
    if "--json" in sys.argv:
        with contextlib.suppress(DiskError):
            print_result(json.dumps({"schema_version": 1, "error": text, "exit_code": code, "enough_bytes": enough_bytes}))
    sys.exit(code)


def _judge(error: Exception, text: str) -> tuple[int, str]:
    """Exit code and words for an exception that nobody foresaw where it was raised."""
    # Not at the top: it imports torch, which is there by now if memory ran out.
    from lowmem_pnn.device import is_out_of_memory
    from lowmem_pnn.stores.disk import disk_error, is_refusal

    if is_out_of_memory(error):
        return BudgetError.exit_code, f"out of memory outside of training ({text}); give a larger --max-gpu-mem"
    if isinstance(error, OSError) and is_refusal(error):
        return DiskError.exit_code, str(disk_error(Path(error.filename or "."), error, "go on"))
    return 1, f"a fault of its own: {text}"


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """Note the first SIGINT, SIGTERM or SIGHUP, for the run to stop at a good place; the second ends the process at once."""
    caught: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        if is_repeated_hangup(number, caught):
            return
        if caught:
            os._exit(128 + number)
        caught.append(number)
        # Not print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, b"lowmem-pnn: stopping after this batch; once more to stop at once\n")

    before = {number: signal.signal(number, handle) for number in stop_signals()}
    # The supervisor starts its worker with these blocked.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
