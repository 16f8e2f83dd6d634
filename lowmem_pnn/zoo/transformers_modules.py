"""Modules of transformers as they are trained: a forward that takes what data sets have, and memory for one that was built without values."""

import functools
import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

# Attribute of a class that returns logits alone: the class of transformers that it is made of.
_OWN_KIND = "_kind_of_transformers"
# And the task of its head.
_TASK = "_task_of_transformers"


@functools.cache
def returning_logits(kind: type[nn.Module], task: str) -> type[nn.Module]:
    """Return a class of the same modules whose forward takes what data sets have by name, and returns logits.

    One class for all models of a kind, so that they count as equal; the `state_dict` has transformers' own names.

    Args:
        kind: Class of transformers.
        task: Task of its head.
    """
    takes = set(inspect.signature(kind.forward).parameters)

    def causal(self: nn.Module, input_ids: Tensor) -> Any:
        return kind.forward(self, input_ids=input_ids).logits

    def with_positions(self: nn.Module, input_ids: Tensor, position_ids: Tensor | None = None) -> Any:
        return kind.forward(self, input_ids=input_ids, position_ids=position_ids).logits

    def masked(self: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return kind.forward(self, input_ids=input_ids, attention_mask=attention_mask).logits

    def with_types(
        self: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Any:
        return kind.forward(self, input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits

    def images(self: nn.Module, pixel_values: Tensor) -> Any:
        return kind.forward(self, pixel_values=pixel_values).logits

    # Theirs write into a cache by default, which training has no use for.
    no_cache = {"use_cache": False} if "use_cache" in takes else {}

    def sequences(
        self: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, decoder_input_ids: Tensor | None = None
    ) -> Any:
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "decoder_input_ids": decoder_input_ids}
        return kind.forward(self, **named, **no_cache).logits

    def speech(self: nn.Module, input_features: Tensor, decoder_input_ids: Tensor) -> Any:
        return kind.forward(self, input_features=input_features, decoder_input_ids=decoder_input_ids, **no_cache).logits

    if task == "seq2seq":
        forward: Callable[..., Any] = speech if "input_features" in takes else sequences
    elif task == "image-classification":
        forward = images
    elif task == "causal-lm":
        forward = with_positions if "position_ids" in takes else causal
    else:
        forward = with_types if "token_type_ids" in takes else masked
    forward.__name__, forward.__qualname__ = "forward", f"{kind.__qualname__}.forward"
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "forward": forward}
    return type(kind.__name__, (kind,), {**names, _OWN_KIND: kind, _TASK: task})


def task_of(model: nn.Module) -> str | None:
    """Return the task of a model's head, as `--task` has it; None of a class that `returning_logits` has not made.

    Args:
        model: Any model.
    """
    return getattr(type(model), _TASK, None)


def full_forward(model: nn.Module) -> Callable[..., Any]:
    """Return a model's forward with all that it takes and returns in transformers, a cache too.

    Args:
        model: A model, whose class `returning_logits` may have made; of any other it is the call.
    """
    kind = getattr(type(model), _OWN_KIND, None)
    return model if kind is None else functools.partial(kind.forward, model)


def full_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the arguments that `full_forward` takes."""
    kind = getattr(type(model), _OWN_KIND, type(model))
    return frozenset(inspect.signature(kind.forward).parameters)


def give_values(model: nn.Module, given: Collection[str]) -> None:
    """Give a model on the meta device memory, and its constructor's values to what nobody else gives values.

    Args:
        model: Model of transformers that was built on the meta device; it is changed.
        given: Names in the `state_dict` of tensors that get their values later, and are zeros till then.
    """
    persistent = {**dict(model.named_parameters(remove_duplicate=False)), **model.state_dict(keep_vars=True)}
    taken = {id(persistent[name]) for name in given if name in persistent}
    twins: dict[int, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if id(tensor) not in twins:
                    memory = torch.zeros(tensor.shape, dtype=tensor.dtype)
                    twin = nn.Parameter(memory, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else memory
                    twin._is_hf_initialized = id(tensor) in taken  # type: ignore[attr-defined]
                    twins[id(tensor)] = twin
                own[name] = twins[id(tensor)]  # type: ignore[assignment]
    model.initialize_weights()  # type: ignore[operator]
    for twin in twins.values():
        del twin._is_hf_initialized  # type: ignore[attr-defined]
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
