"""The command `evaluate`: the scores of a finished run's weights, on its own test data or on others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from lowmem_pnn.cli.options import output_options, place_options, trust_option
from lowmem_pnn.cli.output import print_result, stdout_is_ours


@click.command()
@click.argument("run", type=click.Path(readable=False, path_type=Path))
@click.option(
    "--data",
    metavar="NAME",
    help=(
        "Data with targets, as for fit: its test part, or all of data that has none. Samples are prepared, and classes numbered, as in "
        "training. [default: the test part of the run's own data]"
    ),
)
@place_options
@click.option("--skip-broken", is_flag=True, help="Leave out samples of --data that cannot be used.")
@trust_option
@output_options
def evaluate(
    run: Path,
    data: str | None,
    max_gpu_mem: str | None,
    device: str | None,
    skip_broken: bool,
    trust: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Measure the weights of a finished run on its test data, or on other data, within its memory budget."""
    with stdout_is_ours():
        from rich.console import Console

        from lowmem_pnn.api import evaluate as evaluate_run
        from lowmem_pnn.reporting.progress import Display, TerminalDisplay

        scores = evaluate_run(
            run,
            data,
            max_gpu_mem=max_gpu_mem,
            device=device,
            skip_broken=skip_broken,
            trust=trust,
            display=Display() if quiet else TerminalDisplay(Console(stderr=True)),
        )
    print_result(json.dumps(scores) if as_json else _numbers(scores))


def _numbers(scores: Mapping[str, Any]) -> str:
    """Return the scores that are numbers; tables are for --json."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, int | float))
