"""Samples of text: what a language model says after some prompts, before training and after it."""

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.evaluation.generation import PartitionScorer, generate_tokens
from lowmem_pnn.evaluation.text_forms import text_form
from lowmem_pnn.language.prompts import plain_prompts, prompt_tokens, said_text, tokenizer_of
from lowmem_pnn.language.sampling import Sampling
from lowmem_pnn.run.run import Run
from lowmem_pnn.workload import Workload


def check_samples(workload: Workload) -> None:
    """Refuse prompts that the model of a workload cannot go on with, before anything is trained.

    Args:
        workload: model and data, and the prompts (`--sample`).

    Raises:
        ConfigError: its model does not predict the tokens that come next, its data has no tokenizer, or a prompt has no token.
    """
    config = workload.config
    if config.sample is None:
        return
    form = text_form(workload)
    if form is None:
        raise ConfigError(
            f"--sample: model {workload.source.spec} does not predict the token that comes next of each, and goes on with no text; leave it out"
        )
    tokenizer = tokenizer_of(config.data, workload.dataset.preparation)
    if tokenizer is None:
        raise ConfigError(f"--sample: data {config.data} is tokens as numbers; give their tokenizer: --tokenizer DIR|FILE|bytes")
    for text in config.sample:
        if not prompt_tokens(tokenizer, text, form.source_context):
            raise ConfigError(f"--sample {text!r} has no token to go on from; give another text")


def say_samples(run: Run, when: str) -> list[str]:
    """Have the model of a run go on with its prompts, by the likeliest tokens, and show what it says.

    Args:
        run: the run, with no partition resident.
        when: when it is asked, in words.

    Returns:
        What it says after each prompt; nothing where there are none.
    """
    config, dataset, display = run.workload.config, run.workload.dataset, run.session.display
    form, tokenizer = text_form(run.workload), tokenizer_of(config.data, dataset.preparation)
    if config.sample is None or form is None or tokenizer is None:
        return []
    if (note := plain_prompts(dataset.preparation)) is not None and when.startswith("before"):
        display.message(f"--sample: {note}")
    display.stage(f"asking the model {when}")
    said = generate_tokens(
        PartitionScorer(run, form),
        [prompt_tokens(tokenizer, text, form.source_context) for text in config.sample],
        max_new_tokens=config.sample_tokens,
        sampling=Sampling(),
        seed=config.seed,
        ends=tokenizer.ends,
    )
    texts = [said_text(tokenizer, None if form.source_context else one.prompt, one.tokens) for one in said]
    for prompt, text in zip(config.sample, texts, strict=True):
        display.message(f"{when}, after {prompt!r}: {text!r}")
    return texts
