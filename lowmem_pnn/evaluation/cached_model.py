"""Models that keep keys and values of attention from one token to the next, so that a token costs a forward over itself alone.

gpt            by its own `score_next`
transformers   by the cache that a model's forward makes (`use_cache`), and is handed again: whatever that model keeps

A text is begun with all of its tokens, and gone on with by one at a time.
"""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_pnn.capture.unknown_values import UnknownValues
from lowmem_pnn.device import is_out_of_memory
from lowmem_pnn.device.kernel_memory import (
    PRIMITIVE_CACHE_CAPACITY,
    cached_primitives,
    packing_bytes,
    product_width,
    scratch_bytes,
)
from lowmem_pnn.memory.storage_tracker import StorageTracker
from lowmem_pnn.model.copies import copy_structure, set_mode
from lowmem_pnn.model.parameter_hooks import has_forward_hooks
from lowmem_pnn.model.precision import Precision
from lowmem_pnn.zoo.gpt_model import GPT, KeysAndValues, is_unchanged
from lowmem_pnn.zoo.transformers_modules import full_forward, full_parameters

# What transformers calls the cache in a forward's arguments and results: its name since 5.20, and the one before.
_CACHE_NAMES = ("cache", "past_key_values")


class NoCache(Exception):
    """A model keeps nothing from one token to the next, though its forward takes a cache."""


class CachedModel(ABC):
    """A language model, and what it keeps of the tokens of one text."""

    @abstractmethod
    def begin(self, ids: Tensor, source: Tensor | None = None) -> Tensor:
        """Begin with a text; what was kept of another one goes.

        Args:
            ids: Its tokens (1, T), int64.
            source: Tokens (1, S) of the source, of a model that reads one.

        Returns:
            Scores (V,) of the token after the last.

        Raises:
            NoCache: The model keeps nothing of them.
        """

    @abstractmethod
    def go_on(self, ids: Tensor) -> Tensor:
        """Go on with the next token (1, 1), and return the scores (V,) of the one after it."""

    @abstractmethod
    def forget(self) -> None:
        """Forget all that is kept."""


def cached_model(model: nn.Module, *, reads_source: bool) -> CachedModel | None:
    """Return a model as one that keeps keys and values; None where its forward does not say that it can.

    Args:
        model: The whole model, which stays as it is.
        reads_source: Whether it writes targets of sources.
    """
    if type(model) is GPT:
        # Hooks may look at whole texts, and `score_next` shows them single tokens, or passes them by.
        is_own = is_unchanged(model) and not any(map(has_forward_hooks, model.modules()))
        return _CachedGpt(model) if is_own and not reads_source else None
    forward, taken = full_forward(model), full_parameters(model)
    if forward is not model and (has_forward_hooks(model) or "forward" in vars(model)):
        return None  # for the class's forward passes by what hangs on the model itself
    wanted = {"input_ids", "use_cache", *({"attention_mask", "decoder_input_ids", "encoder_outputs"} if reads_source else ())}
    cache = next((name for name in _CACHE_NAMES if name in taken), None)
    if cache is None or not wanted <= taken:
        return None
    return _CachedTransformer(forward, cache, {"logits_to_keep": 1} if "logits_to_keep" in taken else {})


class _CachedGpt(CachedModel):
    def __init__(self, model: GPT) -> None:
        self._model = model
        self._past: KeysAndValues = []

    def begin(self, ids: Tensor, source: Tensor | None = None) -> Tensor:
        self.forget()
        return self._model.score_next(ids, self._past)[0]

    def go_on(self, ids: Tensor) -> Tensor:
        return self._model.score_next(ids, self._past)[0]

    def forget(self) -> None:
        self._past = []


class _CachedTransformer(CachedModel):
    """A model of transformers.

    Args:
        forward: Its forward.
        cache: Name of the cache in what that takes and returns.
        options: What is to be said to it beside.
    """

    def __init__(self, forward: Callable[..., Any], cache: str, options: Mapping[str, Any]) -> None:
        self._forward, self._cache, self._options = forward, cache, dict(options)
        self._kept: dict[str, Any] = {}

    def begin(self, ids: Tensor, source: Tensor | None = None) -> Tensor:
        self.forget()
        if source is None:
            return self._run({"input_ids": ids}, {})
        mask = {"attention_mask": torch.ones_like(source)}
        return self._run({"input_ids": source, "decoder_input_ids": ids, **mask}, mask)

    def go_on(self, ids: Tensor) -> Tensor:
        name = "decoder_input_ids" if "encoder_outputs" in self._kept else "input_ids"
        return self._run({name: ids, **self._kept}, self._kept)

    def forget(self) -> None:
        self._kept = {}

    def _run(self, named: Mapping[str, Any], kept: Mapping[str, Any]) -> Tensor:
        outputs = self._forward(**named, **self._options, use_cache=True, return_dict=True)
        logits, cache = getattr(outputs, "logits", None), getattr(outputs, self._cache, None)
        if cache is None or not isinstance(logits, Tensor):
            raise NoCache
        self._kept = {**kept, self._cache: cache}
        if (encoded := getattr(outputs, "encoder_last_hidden_state", None)) is not None:
            modeling: Any = importlib.import_module("transformers.modeling_outputs")
            self._kept["encoder_outputs"] = modeling.BaseModelOutput(last_hidden_state=encoded)
        scores: Tensor = logits[0, -1]
        return scores


class _Peak(StorageTracker):
    """Counts live bytes with the scratch memory of kernels, kernels that are compiled, and the width of products."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.widest = 0, 0
        self.compiled: dict[Hashable, int] = {}

    def _after_operation(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        self.most = max(self.most, self.live + scratch_bytes(func, args, result))
        self.widest = max(self.widest, product_width(func, args))
        self.compiled.update(cached_primitives(func, args))


def foreseen_bytes(model: nn.Module, precision: Precision, length: int, source: int | None) -> int | None:
    """Foresee the most bytes that a text takes beside the weights: what is kept of it, and a forward; on fake tensors.

    Args:
        model: The whole model; its tensors are not read.
        precision: Type that it computes in.
        length: Most tokens of a text.
        source: Most tokens of a source; None of a model that reads none.

    Returns:
        Bytes; None where the model keeps nothing, or does not run on fake tensors.

    Raises:
        Exception: Memory ran out.
    """
    device = "cpu" if precision.dtype == "fp32" else precision.device_type
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes: dict[int, Tensor] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    ids = torch.zeros((1, max(1, length - 2)), dtype=torch.int64, device=device)
    written = None if source is None else torch.zeros((1, source), dtype=torch.int64, device=device)
    try:
        root = copy_structure(model, fakes)
        set_mode(root, False)
        cached = cached_model(root, reads_source=source is not None)
        if cached is None:
            return None
        with mode, UnknownValues(), torch.random.fork_rng(devices=[]), torch.no_grad(), precision.autocast(), _Peak() as peak:
            cached.begin(ids, written)
            cached.go_on(ids[:, :1])
            first = dict(peak.compiled)
            cached.go_on(ids[:, :1])
    # A forward may fail in any way on tensors without values, or in its own cache: without one it has run in training.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
    finally:
        FakeTensorMode.cache_clear()
    # Kernels whose shapes grow with the text are compiled anew for each token.
    again = [size for key, size in peak.compiled.items() if key not in first]
    times = min(length, PRIMITIVE_CACHE_CAPACITY // max(1, len(again)))
    return peak.most + packing_bytes(peak.widest, torch.get_num_threads()) + sum(first.values()) + times * sum(again)
