"""Ways in which a trained language model may go on with texts in its budget: with keys and values kept, as a whole, or in partitions."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lowmem_pnn.device import Device, is_out_of_memory
from lowmem_pnn.engine.worker_threads import WorkerThreads
from lowmem_pnn.errors import BudgetError
from lowmem_pnn.evaluation.cached_scorer import CachedScorer, CacheFault, weight_bytes, whole_model, why_not_cached
from lowmem_pnn.evaluation.generation import PartitionScorer, Scorer, generate_tokens
from lowmem_pnn.evaluation.text_forms import Continuation, TextForm, check_prompt
from lowmem_pnn.inference.smaller_budget import in_one_partition, within
from lowmem_pnn.language.sampling import Sampling
from lowmem_pnn.partition_plan import Plan
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.run.finished import FinishedRun
from lowmem_pnn.run.run import Run
from lowmem_pnn.run.session import Session
from lowmem_pnn.run.state import State
from lowmem_pnn.stores.disk import remove_folder
from lowmem_pnn.stores.run_directory import RunDirectory
from lowmem_pnn.training.initial_weights import build_weights
from lowmem_pnn.workload import Workload


@dataclass(frozen=True)
class Asked:
    """What a model is asked.

    Args:
        prompts: Tokens of the texts.
        max_new_tokens: Tokens that are said of each at most.
        sampling: How a token is chosen.
        seed: Seed of the choices.
        ends: Tokens after which a text is not gone on with.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling
    seed: int
    ends: frozenset[int]


@dataclass(frozen=True)
class _Way:
    """A way of going on with texts.

    Args:
        words: What is said of it.
        plan: Partitions of the model.
        scorer: Makes what scores tokens.
    """

    words: str
    plan: Plan
    scorer: Callable[[Run], Scorer]


def said_by_trained(
    finished: FinishedRun,
    rundir: RunDirectory,
    threads: WorkerThreads,
    display: Display,
    device: Device,
    workload: Workload,
    form: TextForm,
    asked: Asked,
    scratch: Path,
) -> list[Continuation]:
    """Have the model of a finished run go on with texts, in the fastest way that its budget has room for.

    Where memory runs out in one way, or the model's own cache does not hold what a whole forward gives, the next is taken; the texts are the
    same, up to rounding.

    Args:
        finished: What the run left.
        rundir: Its folder.
        threads: Threads that read and write.
        display: Is told which way is taken, and why no faster one.
        device: The device, open.
        workload: The model.
        form: How texts are handed to it.
        asked: What it is asked.
        scratch: Folder for its weights.

    Raises:
        BudgetError: A layer does not fit in the budget.
        ConfigError: A prompt cannot be gone on with.
    """
    for number, prompt in enumerate(asked.prompts, start=1):
        check_prompt(form, prompt, number)
    ways = list(_ways(finished, device, workload, form, asked))
    device.enforce()
    session = Session(device, rundir, threads, display, scratch=scratch)
    trained = rundir.path / "model.safetensors"
    for number, way in enumerate(ways):
        count, most = len(asked.prompts), asked.max_new_tokens
        display.stage(f"going on with {count} text{'s' if count > 1 else ''}, {most:,} tokens at most, {way.words}")
        folder = scratch / f"weights-{number}"
        weights = build_weights(workload, way.plan, folder, session.counter, trained, metered=device.metered)
        state = State.trained(workload, way.plan, finished.state.module_state)
        run = Run(session, workload, way.plan, weights, state)
        began = time.monotonic()
        try:
            said = generate_tokens(
                way.scorer(run),
                asked.prompts,
                max_new_tokens=asked.max_new_tokens,
                sampling=asked.sampling,
                seed=asked.seed,
                ends=asked.ends,
            )
            done = sum(len(text.tokens) + text.is_ended for text in said)
            display.message(f"{done:,} tokens in {time.monotonic() - began:.1f} s")
            return said
        except Exception as error:
            if number + 1 == len(ways) or not (isinstance(error, BudgetError | CacheFault) or is_out_of_memory(error)):
                raise
            reason = str(error)
        # Not inside the handler: the exception holds tensors.
        display.message(f"not so, for {reason.partition('; ')[0]}")
        del run, weights
        remove_folder(folder)
        device.release()
        device.begin_section()
    raise AssertionError("the last way returns or raises")


def _ways(finished: FinishedRun, device: Device, workload: Workload, form: TextForm, asked: Asked) -> Iterator[_Way]:
    """Yield the ways that fit, the fastest first."""
    trained = Plan.from_json(finished.state.plan)
    plan, whole = within(trained, workload, device.budget_bytes), in_one_partition(trained, workload)
    longest = max(map(len, asked.prompts))
    source = form.source_context and min(form.source_context, longest)
    length = asked.max_new_tokens if form.source_context else longest + asked.max_new_tokens
    length = min(length, form.context if form.most_tokens is None else form.most_tokens)
    model = whole_model(workload)
    reason = why_not_cached(workload, model, form, device, length, source)
    if reason is None:
        yield _Way(
            "by the whole model, which keeps keys and values of the tokens before",
            whole,
            lambda run: CachedScorer(run, form, model),
        )
        reason = "nothing is kept"
    shape = f"rows of {form.context:,}"
    if len(plan.partitions) > 1 and _leaves_room(workload, device):
        yield _Way(_forwards(shape, 1, reason), whole, lambda run: PartitionScorer(run, form))
    yield _Way(_forwards(shape, len(plan.partitions), reason), plan, lambda run: PartitionScorer(run, form))


def _leaves_room(workload: Workload, device: Device) -> bool:
    """Decide whether all weights may be resident: in half of the budget at most, as `within` divides partitions.

    What a forward takes beside them is not computed, for micro-batches are halved until it fits; the other half is for that.
    """
    return 2 * weight_bytes(workload) <= device.budget_bytes


def _forwards(shape: str, partitions: int, reason: str) -> str:
    parts = "1 partition" if partitions == 1 else f"{partitions} partitions"
    return f"by a forward over {shape} for each ({parts}): {reason}"
