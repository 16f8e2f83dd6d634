"""The command `bench`: peak memory and speed of every method, and of plain PyTorch, in one table."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from lowmem_pnn.cli.options import GroupedCommand, config_options, given_options, output_options, typed_options
from lowmem_pnn.cli.output import announce, print_result, stdout_is_ours, terminal_width
from lowmem_pnn.cli.supervisor import stop_signals
from lowmem_pnn.config.faults import flag
from lowmem_pnn.config.fit_config import METHODS
from lowmem_pnn.contenders.contender_options import LEFT_OUT
from lowmem_pnn.errors import BudgetError, ConfigError, DiskError

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(cls=GroupedCommand)
@partial(config_options, unread=LEFT_OUT, decided=("method",))
@click.option("--budgets", metavar="SIZE,...", help="Budgets that each method is given in turn. [default: --max-gpu-mem]")
@click.option("--methods", metavar=f"{'|'.join(METHODS)},...|all", help="Methods. [default: all, or --method]")
@click.option(
    "--baselines",
    metavar="plain|checkpointing|accumulation,...|all|none",
    default="all",
    help="Ways of plain PyTorch. [default: all of them]",
)
@click.option(
    "--steps", metavar="N", type=click.IntRange(min=1), default=10, help="Optimizer steps of each contender. [default: 10]"
)
@click.option("--csv", "csv_file", metavar="FILE", type=_FILE, help="Write the table as CSV, too.")
@click.option("--html", "html_file", metavar="FILE", type=_FILE, help="Write a page with the table and a picture, too.")
@click.option("--svg", "svg_file", metavar="FILE", type=_FILE, help="Write the picture alone, too.")
@output_options
def bench(
    budgets: str | None,
    methods: str | None,
    baselines: str,
    steps: int,
    csv_file: Path | None,
    html_file: Path | None,
    svg_file: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Measure peak memory and speed: every method in every budget, and plain PyTorch, a few steps each in a process of its own that is
    polled from outside. Runs are kept in a hidden folder of the current one meanwhile.

    Try it: lowmem-pnn bench --model mlp:64-2048-2048-2048-10 --data digits --budgets 100M,50M
    """
    given, typed = given_options(options), typed_options(options)
    for one, name, several in (("max_gpu_mem", "budgets", budgets), ("method", "methods", methods)):
        if one in typed and several is not None:
            raise click.UsageError(f"{flag(one)} and {flag(name)} exclude each other; give one", click.get_current_context())
    budget, method = given.pop("max_gpu_mem", None), given.pop("method", "all")
    budgets, methods = budgets or (None if budget is None else str(budget)), methods or method
    if not budgets:
        raise click.UsageError("--budgets is missing; give --budgets 1GB,500MB", click.get_current_context())
    for name, example in (("model", "mlp:64-2048-2048-10"), ("data", "digits")):
        if name not in given:
            raise click.UsageError(f"--{name} is missing; give --{name} {example}", click.get_current_context())
    files = {"--csv": csv_file, "--html": html_file, "--svg": svg_file}
    for option, file in files.items():
        _check_place(option, file)
    if not quiet:
        announce(f"bench {given['model']} on {given['data']} in {budgets}: {methods} methods, {baselines} baselines")
    with _ended_by_signals(), stdout_is_ours():
        from lowmem_pnn.contenders.bench import bench as run_bench

        # A file of a run has more than a bench has a use for.
        if left := [name for name in given if name in LEFT_OUT and name not in typed]:
            given = {name: value for name, value in given.items() if name not in left}
            if not quiet:
                announce(f"left out of --config, since contenders take a few training steps alone: {', '.join(map(flag, left))}")
        report = run_bench(
            given.pop("model"),
            given.pop("data"),
            budgets=budgets.split(","),
            methods=methods,
            baselines=baselines,
            steps=steps,
            say=(lambda text: None) if quiet else announce,
            **given,
        )
    print_result(report.to_json() if as_json else report.describe(terminal_width()))
    try:
        if csv_file is not None:
            _write("--csv", csv_file, report.to_csv())
        if html_file is not None:
            from lowmem_pnn.page.bench_page import bench_page

            _write("--html", html_file, bench_page(report))
        if svg_file is not None:
            from lowmem_pnn.page.figures import alone, bench_figure

            _write("--svg", svg_file, alone(bench_figure(report.rows)))
    except DiskError as error:
        # The result is printed by now, and is the only thing on standard output.
        print(f"lowmem-pnn: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    codes = {row.exit_code for row in report.rows}
    why = next((code for code in (ConfigError.exit_code, DiskError.exit_code) if codes == {code}), BudgetError.exit_code)
    sys.exit(0 if any(row.fits for row in report.rows) else why)


def _check_place(option: str, file: Path | None) -> None:
    """Refuse a file that cannot be written, before anything is measured; what is there stays as it is till then."""
    if file is None:
        return
    was_there = os.path.lexists(file)
    _write(option, file, "", mode="a")
    if not was_there:
        file.unlink()


def _write(option: str, file: Path, text: str, mode: str = "w") -> None:
    try:
        with file.open(mode, encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise DiskError(f"cannot write {option} {file}: {reason}; give another place") from error


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """End by an exception where a signal asks for the end, so that the contender that runs ends too, and its files go."""

    def end(number: int, _: FrameType | None) -> NoReturn:
        # Not print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, b"lowmem-pnn: stopped\n")
        sys.exit(128 + number)

    before = {number: signal.signal(number, end) for number in stop_signals() if number != signal.SIGINT}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
