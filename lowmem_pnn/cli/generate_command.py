"""The command `generate`: a trained language model goes on with texts, or writes them."""

import dataclasses
from pathlib import Path

import click

from lowmem_pnn.cli.options import output_options, place_options, trust_option
from lowmem_pnn.cli.output import print_result, stdout_is_ours


@click.command()
@click.argument("run", type=click.Path(readable=False, path_type=Path))
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    required=True,
    metavar="TEXT",
    help="Text to go on with, or to write another for; several times for several texts, which share the reading of the weights.",
)
@click.option("--max-new-tokens", type=int, default=100, metavar="N", help="Tokens that are said at most. [default: 100]")
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    metavar="X",
    help="What scores are divided by before a token is drawn; 0 takes the likeliest. [default: 0]",
)
@click.option("--top-k", type=int, metavar="K", help="Draw among the K likeliest tokens.")
@click.option("--top-p", type=float, metavar="X", help="Draw among the likeliest tokens that have this probability together.")
@click.option("--seed", type=int, default=0, metavar="N", help="Seed of what is drawn. [default: 0]")
@click.option("--tokenizer", metavar="DIR|FILE|bytes", help="Tokenizer of the texts. [default: that of the run's data]")
@place_options
@trust_option
@output_options
def generate(
    run: Path,
    prompts: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    tokenizer: str | None,
    max_gpu_mem: str | None,
    device: str | None,
    trust: bool,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> None:
    """Go on with texts by the language model of a finished run, within its memory budget; or write a text for each (T5, BART).

    Where the budget has room for the whole model and the keys and values of a text, a token takes a forward over itself. Else it takes one
    over the whole text (up to the model's context), and a reading of the weights if they are in several partitions. It is said which.
    """
    import json

    with stdout_is_ours():
        from rich.console import Console

        from lowmem_pnn.inference.generate import generate_run
        from lowmem_pnn.language.sampling import Sampling
        from lowmem_pnn.reporting.progress import TerminalDisplay

        said = generate_run(
            run,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p),
            seed=seed,
            tokenizer=tokenizer,
            max_gpu_mem=max_gpu_mem,
            device=device,
            trust=trust,
            display=None if quiet else TerminalDisplay(Console(stderr=True)),
        )
    if as_json:
        print_result(json.dumps([dataclasses.asdict(one) for one in said]))
    else:
        print_result("\n\n".join(one.shown() for one in said))
