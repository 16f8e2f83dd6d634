"""Generation by finished runs: a trained language model goes on with texts, or writes them, within the run's budget or another."""

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.config.resume import check_trust
from lowmem_pnn.device import Device
from lowmem_pnn.errors import BudgetError, ConfigError, LowMemError
from lowmem_pnn.evaluation.text_forms import TextForm, source_context_of, text_form
from lowmem_pnn.inference.load import folder_of, form_of, given_model
from lowmem_pnn.inference.opened_run import opened_run
from lowmem_pnn.inference.other_machine import options_here
from lowmem_pnn.inference.ways_to_generate import Asked, said_by_trained
from lowmem_pnn.language.prompts import plain_prompts, prompt_tokens, said_text, tokenizer_of
from lowmem_pnn.language.sampling import Sampling
from lowmem_pnn.language.tokenizer import Tokenizer, named_ends
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.run.finished import FinishedRun
from lowmem_pnn.run.resume import check_plan
from lowmem_pnn.training.setup import open_workload, warm_up_profiler
from lowmem_pnn.workload import Workload
from lowmem_pnn.workload.data_form import DataForm
from lowmem_pnn.workload.inputs import Model
from lowmem_pnn.workload.trained import trained_inputs, trained_source
from lowmem_pnn.zoo.model_source import ModelSource

DEFAULT_NEW_TOKENS = 100

# Rows are as long as is needed, up to such a multiple: the same texts beside others of about their length give the same bits.
_LENGTH_STEP = 32

Prompt = str | Sequence[int]
"""A text, or its tokens."""


@dataclass(frozen=True)
class Generated:
    """What a model said after a prompt.

    Args:
        prompt: The prompt, as it was given.
        text: What was said, as text; None where the prompt was tokens, and there is no tokenizer.
        tokens: What was said, as tokens.
        ended: `end` where the model said an end token, `length` where it said as many tokens as it was to.
    """

    prompt: Prompt
    text: str | None
    tokens: list[int]
    ended: str

    def shown(self) -> str:
        """Return it for people: the prompt, which it goes on with, and what was said."""
        return f"{self.prompt}{self.text}"


@dataclass(frozen=True)
class Written(Generated):
    """What a model wrote for a prompt, which is the source of a text of its own; arguments are those of `Generated`."""

    def shown(self) -> str:
        """Return it for people: what was written."""
        return str(self.text)


def generate(
    run: str | Path | Result,
    prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    tokenizer: str | Path | None = None,
    model: Model | None = None,
    max_gpu_mem: str | int | None = None,
    device: str | None = None,
    trust: bool = False,
    display: Display | None = None,
) -> Any:
    """Have the language model of a finished run go on with texts, within its budget; or write a text for each, as T5 and BART do.

    Where the whole model fits in the budget with the keys and values of a text, these are kept, and a token takes a forward over itself. Else
    every token takes a forward over the whole text, and a reading of all weights that do not stay in the budget: several prompts share it.

    Args:
        run: the run's folder, which need not be writable, or its result.
        prompts: a text, or several; or their tokens, in lists, arrays or tensors. Of what is longer than the model's context the last tokens
            are seen; of a source the first.
        max_new_tokens: tokens that are said at most; an end token ends a text before: the tokenizer's, or one that the `eos_token_id` of its
            folder names.
        temperature: 0 takes the likeliest token; else tokens are drawn, their scores divided by it.
        top_k: tokens among which one is drawn, those with the highest scores.
        top_p: share of the probability that the likeliest tokens, among which one is drawn, have together.
        seed: seed of what is drawn: a function of it, the text's number, and the token's.
        tokenizer: `bytes`, a file or a folder; None takes that of the run's data.
        model: what builds the model, of a run that was started from Python with a model of its own; runs of this process remember it.
        max_gpu_mem: another budget than the run's.
        device: another device than the run's: "cpu", "cuda", "cuda:1" or "auto".
        trust: run code that the run names for its model (`file.py:factory`).
        display: is told how far it is; None shows nothing.

    Returns:
        What the model said, without the prompt: a text, or for several prompts a list of texts; lists of tokens where prompts are tokens.

    Raises:
        CheckpointError: no run is there, it has not finished, or its files are damaged.
        ConfigError: its model predicts something else than the tokens that come next, a prompt is empty, or there is no tokenizer.
        BudgetError: a layer does not fit in the budget.

    Example:
        `lowmem_pnn.generate("runs/gpt-exact-1", "ROMEO:", max_new_tokens=50, temperature=0.8)`
    """
    given, one = _given(prompts)
    said = generate_run(
        folder_of(run),
        given,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
        tokenizer=None if tokenizer is None else str(tokenizer),
        model=model,
        max_gpu_mem=max_gpu_mem,
        device=device,
        trust=trust,
        display=display,
    )
    answers = [text.text if isinstance(text.prompt, str) else text.tokens for text in said]
    return answers[0] if one else answers


def generate_run(
    path: Path,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    sampling: Sampling,
    seed: int = 0,
    tokenizer: str | None = None,
    model: Model | None = None,
    max_gpu_mem: str | int | None = None,
    device: str | None = None,
    trust: bool = False,
    display: Display | None = None,
) -> list[Generated]:
    """Go on with several texts by a finished run; arguments are those of `generate`.

    Returns:
        What was said after each prompt, in their order.
    """
    display = display or Display()
    if not prompts:
        raise ConfigError("there is no prompt; give one or more texts to go on with")
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {max_new_tokens} says nothing; give a number from 1")
    with ExitStack() as stack:
        stack.callback(display.close)
        display.stage("opening the model")
        rundir, threads, finished = stack.enter_context(opened_run(path))
        form, model = form_of(finished, path), given_model(path, model)
        config = options_here(finished.config, max_gpu_mem, device)
        named = {"loss": config.loss, "data": config.data, "val_data": "", "test_data": ""}
        check_trust(config, named | ({} if model is None else {"model": config.model}), path, trust=trust, again=False)
        if form.targets.kind != "tokens" or len(form.inputs[0].shape) != 1:
            raise ConfigError(
                f"the run in {path} predicts no tokens that come next ({config.task} of {form}), and goes on with no text; give predict"
            )
        reader = tokenizer_of(finished.config.data, finished.result.preparation, tokenizer)
        source_context = source_context_of(form)
        tokens = [_tokens_of(prompt, number, reader, path, source_context) for number, prompt in enumerate(prompts, start=1)]
        note = plain_prompts(finished.result.preparation)
        if note is not None and any(isinstance(prompt, str) for prompt in prompts):
            display.message(note)
        source = trained_source(config, model, form.targets.num_classes, f"lowmem_pnn.generate({str(path)!r}, prompts")
        warm_up_profiler()
        length = None if source_context else max(map(len, tokens)) + max_new_tokens - 1
        opened_device, workload, texts = stack.enter_context(_opened(finished, config, form, source, length, path))
        if texts.most_tokens is not None and texts.most_tokens < max_new_tokens:
            display.message(
                f"a text has {texts.most_tokens:,} tokens at most, as the targets that the run has learnt (--target-context)"
            )
        asked = Asked(tokens, max_new_tokens, sampling, seed, _ends(reader, source))
        rundir.clear()
        scratch = stack.enter_context(rundir.scratch())
        said = said_by_trained(finished, rundir, threads, display, opened_device, workload, texts, asked, scratch)
        display.close()
        kind = Generated if source_context is None else Written
        return [
            kind(
                prompt,
                None if reader is None else said_text(reader, text.prompt if source_context is None else None, text.tokens),
                text.tokens,
                "end" if text.is_ended else "length",
            )
            for prompt, text in zip(prompts, said, strict=True)
        ]


def _given(prompts: Any) -> tuple[list[Any], bool]:
    """Return prompts as a list, and whether it is one alone: a text, or its tokens, in a list, an array or a tensor."""
    if isinstance(prompts, str):
        return [prompts], True
    try:
        given = list(prompts)
    except TypeError:
        raise ConfigError(f"prompts are of type {type(prompts).__name__}; give a text, its tokens, or a list of such") from None
    # Numbers of NumPy, and tensors of one number, have no axes; nor have texts of NumPy.
    one = bool(given) and not isinstance(given[0], str) and (isinstance(given[0], int) or getattr(given[0], "ndim", None) == 0)
    return ([given] if one else given), one


def _tokens_of(prompt: Prompt, number: int, tokenizer: Tokenizer | None, path: Path, source_context: int | None) -> list[int]:
    if not isinstance(prompt, str):
        try:
            return [operator.index(token) for token in prompt]
        except TypeError:
            raise ConfigError(f"prompt {number} is neither text nor tokens; give whole numbers, from 0") from None
    if tokenizer is None:
        raise ConfigError(f"the data of the run in {path} is tokens as numbers; give their tokenizer: --tokenizer DIR|FILE|bytes")
    return prompt_tokens(tokenizer, prompt, source_context)


def _ends(tokenizer: Tokenizer | None, source: ModelSource) -> frozenset[int]:
    """Return the tokens at which a text ends: the tokenizer's, or of tokens as numbers those that the model's folder names."""
    if tokenizer is not None:
        return tokenizer.ends
    folder = None if source.transformers is None else source.transformers.folder
    return frozenset(() if folder is None else named_ends(folder))


@contextmanager
def _opened(
    finished: FinishedRun, config: FitConfig, form: DataForm, source: ModelSource, length: int | None, path: Path
) -> Iterator[tuple[Device, Workload, TextForm]]:
    """Open the model for rows that are as short as will do, or, where it is not to be had for these, as long as in training."""
    context = form.inputs[0].shape[0]
    shorter = context if length is None else min(context, -(-length // _LENGTH_STEP) * _LENGTH_STEP)
    with ExitStack() as stack:
        if shorter < context:
            try:
                opened = _open(stack, finished, config, _of_length(form, shorter), source, path)
            except BudgetError:
                raise
            # A model that takes one length alone may say so in any way: in training it did.
            except LowMemError:
                opened = _open(stack, finished, config, form, source, path)
        else:
            opened = _open(stack, finished, config, form, source, path)
        yield opened


def _open(
    stack: ExitStack, finished: FinishedRun, config: FitConfig, form: DataForm, source: ModelSource, path: Path
) -> tuple[Device, Workload, TextForm]:
    config, inputs = trained_inputs(config, form, source)
    with ExitStack() as own:
        device, workload = own.enter_context(open_workload(config, inputs))
        check_plan(finished.state, workload, path)
        texts = text_form(workload)
        if texts is None:
            raise ConfigError(
                f"the model of the run in {path} takes {form}, and not tokens with a mask or positions; it goes on with no text"
                if source_context_of(form) is None
                else f"the model of the run in {path} does not say which token its texts begin with (decoder_start_token_id of its "
                "configuration), or scores no tokens; it writes no text"
            )
        stack.push(own.pop_all())
    return device, workload, texts


def _of_length(form: DataForm, length: int) -> DataForm:
    return dataclasses.replace(
        form,
        inputs=tuple(TensorSpec((length,), torch.int64) for _ in form.inputs),
        targets=dataclasses.replace(form.targets, shape=(length,)),
    )
