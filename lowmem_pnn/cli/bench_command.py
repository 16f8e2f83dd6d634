"""The command `bench`: peak memory and speed of every method, and of plain PyTorch, in one table."""

import sys
from pathlib import Path
from typing import Any

import click

from lowmem_pnn.cli.options import GroupedCommand, config_options, given_options, output_options
from lowmem_pnn.cli.output import announce, print_result, terminal_width
from lowmem_pnn.errors import DiskError
from lowmem_pnn.memory.available import is_share

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(cls=GroupedCommand)
@config_options
@click.option("--budgets", metavar="SIZE,...", help="Budgets that each method is given in turn. [default: --max-gpu-mem]")
@click.option("--methods", metavar="NAME,...|all", default="all", help="Methods. [default: all, or --method]")
@click.option(
    "--baselines",
    metavar="NAME,...|none",
    default="all",
    help="Ways of plain PyTorch: plain, checkpointing, accumulation. [default: all of them]",
)
@click.option(
    "--steps", metavar="N", type=click.IntRange(min=1), default=10, help="Optimizer steps of each contender. [default: 10]"
)
@click.option("--csv", "csv_file", metavar="FILE", type=_FILE, help="Write the table as CSV, too.")
@click.option("--html", "html_file", metavar="FILE", type=_FILE, help="Write a page with the table and a picture, too.")
@output_options
def bench(
    budgets: str | None,
    methods: str,
    baselines: str,
    steps: int,
    csv_file: Path | None,
    html_file: Path | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Measure peak memory and speed: every method in every budget, and plain PyTorch, a few steps each in a process of its own that is
    polled from outside.

    Try it: lowmem-pnn bench --model mlp:64-2048-2048-2048-10 --data digits --budgets 100M,50M
    """
    given = given_options(options)
    budget = given.pop("max_gpu_mem", None)
    if budgets is None and budget is None:
        raise click.UsageError("--budgets is missing; give --budgets 1GB,500MB", click.get_current_context())
    if budgets is not None and budget is not None:
        raise click.UsageError("--max-gpu-mem and --budgets exclude each other; give one", click.get_current_context())
    if methods == "all" and "method" in given:
        methods = given["method"]
    given.pop("method", None)
    for name, example in (("model", "mlp:64-2048-2048-10"), ("data", "digits")):
        if name not in given:
            raise click.UsageError(f"--{name} is missing; give --{name} {example}", click.get_current_context())
    if not quiet:
        announce(f"bench {given['model']} on {given['data']} in {budgets or budget}: {methods} methods, {baselines} baselines")
    from lowmem_pnn.contenders.bench import bench as run_bench

    report = run_bench(
        given.pop("model"),
        given.pop("data"),
        budgets=[budget] if is_share(budget) else (budgets or str(budget)).split(","),
        methods=methods,
        baselines=baselines,
        steps=steps,
        say=(lambda text: None) if quiet else announce,
        **given,
    )
    try:
        if csv_file is not None:
            csv_file.write_text(report.to_csv())
        if html_file is not None:
            from lowmem_pnn.page.bench_page import bench_page

            html_file.write_text(bench_page(report))
    except OSError as error:
        raise DiskError(f"cannot write {error.filename}: {(error.strerror or str(error)).lower()}") from error
    print_result(report.to_json() if as_json else report.describe(terminal_width()))
    sys.exit(0 if any(row.fits for row in report.rows) else 4)
