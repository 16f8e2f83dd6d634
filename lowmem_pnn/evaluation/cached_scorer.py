"""The cached scorer: the whole model of a run, resident as its user's own modules, which keep keys and values from one token to the next.

    first token of a text:   all of its tokens -> model -> scores, and what it keeps
    every other:             the token before it -> model -> scores

One text goes on after the other, so that what is said after it does not depend on what stands beside it, and is kept for one at a time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lowmem_pnn.adapters.prepared_model import prepared
from lowmem_pnn.device import Device
from lowmem_pnn.engine.out_of_memory import too_large, unless_out_of_memory
from lowmem_pnn.engine.residency import Residency
from lowmem_pnn.errors import BudgetError, LowMemError
from lowmem_pnn.evaluation.cached_model import CachedModel, NoCache, cached_model, foreseen_bytes
from lowmem_pnn.evaluation.generation import PartitionScorer
from lowmem_pnn.evaluation.text_forms import Continuation, TextForm
from lowmem_pnn.model.copies import copy_structure, set_mode
from lowmem_pnn.model.precision import Precision
from lowmem_pnn.model.python_state import write_by_name
from lowmem_pnn.run.run import Run
from lowmem_pnn.seeds import seeded
from lowmem_pnn.sources.imports import one_line
from lowmem_pnn.stores.keys import weight_key
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload
from lowmem_pnn.zoo.deferred_init import skeleton

# Scores by what was kept may differ from those of a whole forward by rounding: by so much of their largest, by type of computing.
_ROUNDING = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.02}


class CacheFault(Exception):
    """The model is not to go on by what it keeps; the text says why."""


def whole_model(workload: Workload) -> nn.Module:
    """Return the model of a workload as its user has it, prepared as the options say, without values."""
    config = workload.config
    built = skeleton(workload.source.build, seed=config.seed)
    with seeded(config.seed):
        return prepared(built, config, unstored=workload.unstored, with_values=False)


def why_not_cached(
    workload: Workload, model: nn.Module, form: TextForm, device: Device, length: int, source: int | None
) -> str | None:
    """Say why texts are to go on without a cache of keys and values; None where they may go on with one.

    Args:
        workload: Model and data.
        model: The model as `whole_model` returns it.
        form: How texts are handed to it.
        device: The device, open.
        length: Most tokens of a text, with what is said; of a target.
        source: Most tokens of a source; None of a model that reads none.
    """
    if cached_model(model, reads_source=form.source_context is not None) is None:
        return "the model keeps no keys and values of attention that are known"
    kept = foreseen_bytes(model, _precision(workload, device), length, source)
    if kept is None:
        return "the model does not keep its keys and values on tensors without values"
    weights = weight_bytes(workload)
    device.release()  # of what looking at the model has left
    used = max(device.fixed_bytes, device.used_bytes())
    needed = used + weights + kept + device.reserve_bytes + device.slack_for(device.budget_bytes)
    if needed > device.budget_bytes:
        return f"the whole model with its keys and values needs {format_bytes(needed)}, and the budget is {format_bytes(device.budget_bytes)}"
    return None


def weight_bytes(workload: Workload) -> int:
    """Return the bytes of all weights and buffers, each once."""
    tensors = {
        id(tensor): tensor
        for layer in workload.chain.layers
        for tensor in (*layer.parameters().values(), *layer.buffers().values())
    }
    return sum(tensor.nbytes for tensor in tensors.values())


class CachedScorer:
    """Scores tokens by the whole model, which keeps keys and values.

    Args:
        run: The run, of one partition, which is not resident.
        form: How texts are handed to its model.
        model: The model as `whole_model` returns it.
    """

    at_once: int | None = 1

    def __init__(self, run: Run, form: TextForm, model: nn.Module) -> None:
        self._run, self.form, self._model = run, form, model
        self._device = run.session.device
        self._precision = _precision(run.workload, self._device)
        # The chain that was trained, over the same weights, which what is kept is compared with.
        self._chain = PartitionScorer(run, form)
        self._cached: CachedModel | None = None
        # Number and tokens of the text of which something is kept.
        self._last: tuple[int, list[int]] | None = None
        self._is_checked = False

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Keep the whole model resident in the context."""
        with self._chain.ready():
            try:
                model = self._resident(self._chain.residency)
                self._cached = cached_model(model, reads_source=self.form.source_context is not None)
                del model
                yield
            finally:
                self._cached, self._last = None, None

    def scores(self, texts: dict[int, Continuation]) -> Iterator[tuple[int, Tensor]]:
        """See `Scorer.scores`.

        Raises:
            BudgetError: Memory ran out.
            CacheFault: Scores by what was kept are others than without.
        """
        for number, text in texts.items():
            source, ids = self.form.sequences(text)
            if not self._is_checked:
                self._check(text)
            is_next = self._last == (number, ids[:-1])
            work = partial(self._go_on, ids[-1:]) if is_next else partial(self._begin, source, ids)
            scores = self._run_within_budget(work)
            self._last = number, ids
            yield number, scores

    def _check(self, text: Continuation) -> None:
        """Compare scores by what is kept of the tokens before the last with those of the trained chain, which keeps nothing.

        It is done for the first text, at its first token, and stands for all that come after.
        """
        self._is_checked = True
        source, ids = self.form.sequences(text)
        if len(ids) == 1 and (self.form.most_tokens or self.form.context) > 1:
            text = Continuation(text.prompt, [*text.tokens, *ids])  # a second token, so that something is kept
            source, ids = self.form.sequences(text)
        whole = self._whole_scores(text)
        kept = self._run_within_budget(partial(self._begin, source, ids[:-1] or ids))
        if len(ids) > 1:
            kept = self._run_within_budget(partial(self._go_on, ids[-1:]))
        most = _ROUNDING[self._precision.dtype] * max(1.0, float(whole.abs().nan_to_num(0.0, 0.0).max()))
        if not torch.allclose(whole, kept, rtol=0.0, atol=most, equal_nan=True):
            raise CacheFault("with the keys and values that the model keeps its scores are others than without")

    def _whole_scores(self, text: Continuation) -> Tensor:
        """Return the chain's scores after a text; the model's own, of a forward over all of it, where the chain's whole rows do not fit."""
        try:
            [(_, scores)] = self._chain.scores({0: text})
            return scores
        except BudgetError:
            pass
        # Not inside the handler: the exception holds tensors. What did not fit is in no section.
        self._device.release()
        self._device.begin_section()
        source, ids = self.form.sequences(text)
        return self._run_within_budget(partial(self._begin, source, ids))

    def _begin(self, source: list[int] | None, ids: list[int]) -> Tensor:
        assert self._cached is not None
        # What is kept of the text before goes first.
        self._cached.forget()
        return self._cached.begin(self._tensor(ids), None if source is None else self._tensor(source))

    def _go_on(self, ids: list[int]) -> Tensor:
        assert self._cached is not None
        return self._cached.go_on(self._tensor(ids))

    def _tensor(self, ids: list[int]) -> Tensor:
        return self._device.to_device(torch.tensor([ids], dtype=torch.int64))

    def _run_within_budget(self, work: "partial[Tensor]") -> Tensor:
        def run() -> Tensor:
            with torch.no_grad(), self._precision.autocast():
                scores = work().float().cpu()
            self._device.check_budget()
            return scores

        try:
            scores = unless_out_of_memory(run)
        except NoCache as error:
            raise CacheFault("the model's forward takes a cache, and keeps nothing in it") from error
        # Whatever a model's code for its cache may raise: without one it has run in training.
        except Exception as error:
            raise CacheFault(f"the model's forward with its cache fails: {one_line(error)[:200]}") from error
        if scores is None:
            raise too_large(self._device, "where the whole model goes on with a text")
        return scores

    def _resident(self, residency: Residency) -> nn.Module:
        """Return the user's model over the tensors of the chain, which are on the device."""
        chain, weights, device = self._run.workload.chain, self._run.weights, self._device
        own = {**residency.parameters, **residency.buffers}
        tensors: dict[int, Tensor] = {}
        model = self._model
        with weights.tensor_reader(device.host_allocator()) as reader:
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                stored = chain.owner_of(name)
                if stored in own:
                    tensors[id(tensor)] = own[stored]
                elif stored in chain.unused:
                    tensors[id(tensor)] = device.to_device(reader.read(weight_key(stored)))
        try:
            model = copy_structure(model, tensors)
        except LowMemError as error:
            raise CacheFault(str(error)) from error
        write_by_name(model, self._run.state.module_state)
        set_mode(model, False)
        return model


def _precision(workload: Workload, device: Device) -> Precision:
    return Precision(workload.config.precision, device.torch_device.type)
