"""Freezing: which parameters do not learn, by patterns of their names, and BatchNorms that are kept in eval mode."""

import difflib
import functools
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowmem_pnn.config.finetuning_options import FineTuningOptions
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.copies import copy_structure

_MOST_NAMED = 3


def with_frozen(
    model: nn.Module, options: FineTuningOptions, base: Collection[str] = (), whole: Collection[str] = ()
) -> nn.Module:
    """Return a copy of a model over the same tensors, in which what the options freeze does not learn.

    A BatchNorm whose parameters are all frozen, some of them by the options or beside adapters, stays in eval mode under `model.train()`.

    Args:
        model: the user's model, which stays as it is; returned itself where the options freeze nothing.
        options: patterns of parameter names.
        base: names of parameters that are frozen too, since adapters learn instead.
        whole: names of parameters that learn beside adapters, even where the model's code froze them, as with peft.

    Raises:
        ConfigError: a pattern matches nothing, or only what the model's code froze and is to learn; or nothing is left to learn.
    """
    if not options.freezes and not base and not whole:
        return model
    names = [name for name, _ in nn.Module.named_parameters(model, remove_duplicate=False)]
    aliases = names_by_tensor(model)
    frozen = {*base, *_frozen_by_patterns(aliases.values(), names, options)}
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    if options.freeze_norm:
        if not norms:
            raise ConfigError("--freeze-norm has no effect here: the model has no BatchNorms; leave it out")
        frozen |= {f"{name}.{own}" for name, module in norms.items() for own, _ in module.named_parameters(recurse=False)}
    by_id = {tensor for tensor, own in aliases.items() if not frozen.isdisjoint(own)}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in by_id]
    _check_learning(options, [name for one in model.parameters() if one.requires_grad for name in aliases[id(one)]], names)
    if not learning and not base and not whole:
        asked = " ".join(options.freezing_flags)
        raise ConfigError(f"{asked} leaves no parameter that learns; freeze less")
    twins = {id(parameter): nn.Parameter(parameter.detach(), False) for parameter in model.parameters() if id(parameter) in by_id}
    thawed = {
        id(parameter): nn.Parameter(parameter.detach())
        for parameter in model.parameters()
        if parameter.is_floating_point()
        and id(parameter) not in by_id
        and not parameter.requires_grad
        and not set(aliases[id(parameter)]).isdisjoint(whole)
    }
    copied = copy_structure(model, {**twins, **thawed})
    for name in norms:
        module = copied.get_submodule(name)
        own = list(module.parameters(recurse=False))
        if options.freeze_norm or (
            own and all(not one.requires_grad for one in own) and any(id(one) in map(id, twins.values()) for one in own)
        ):
            module.__class__ = _kept_in_eval_mode(type(module))  # type: ignore[arg-type]
            module.training = False
    return copied


def names_by_tensor(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of each parameter, by its `id`: several where it is tied."""
    names: dict[int, list[str]] = {}
    # By PyTorch's own method: an override, which is refused in words later on, may not take the argument.
    for name, parameter in nn.Module.named_parameters(model, remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def suggestion(pattern: str, names: Sequence[str]) -> str:
    """Return the end of a message about a pattern that matches no parameter: names that are near it.

    Example:
        >>> suggestion("classifer", ["features.0.weight", "classifier.1.weight", "classifier.1.bias"])
        "; did you mean 'classifier.*'?"
    """
    if any(name.startswith(f"{pattern}.") for name in names):
        return f"; did you mean {pattern + '.*'!r}?"
    prefixes = {name.rsplit(".", count)[0] for name in names for count in range(1, name.count(".") + 1)}
    words = {**{f"{prefix}.*": None for prefix in sorted(prefixes)}, **dict.fromkeys(names)}
    bare = pattern.rstrip("*").rstrip(".")
    known = {word.removesuffix(".*"): word for word in words}
    if near := difflib.get_close_matches(bare, list(known), n=1):
        return f"; did you mean {known[near[0]]!r}?"
    return f"; there are: {', '.join(names[:_MOST_NAMED])}{', ...' if len(names) > _MOST_NAMED else ''}"


def matching(pattern: str, names: Iterable[str]) -> set[str]:
    """Return the names that match a pattern, in which `*` stands for any text, dots too."""
    return {name for name in names if fnmatchcase(name, pattern)}


def check_patterns(flag: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Refuse patterns that match no name.

    Args:
        flag: option that has them.
        patterns: the patterns.
        names: names of all parameters.

    Raises:
        ConfigError: a pattern matches none.
    """
    for pattern in patterns:
        if not matching(pattern, names):
            raise ConfigError(f"{flag} {pattern!r} matches no parameter of the model{suggestion(pattern, names)}")


def _check_learning(options: FineTuningOptions, learning: Collection[str], names: Sequence[str]) -> None:
    """Refuse patterns of what is to learn that match only what the model's code froze."""
    for pattern in options.train_only or ():
        if not matching(pattern, learning):
            frozen = min(matching(pattern, names), key=names.index)
            raise ConfigError(
                f"--train-only {pattern!r} matches only parameters that the model's code froze, such as {frozen!r}; leave it out, or "
                "set requires_grad where the model is made"
            )


def _frozen_by_patterns(groups: Iterable[list[str]], names: Sequence[str], options: FineTuningOptions) -> set[str]:
    """Return the names of frozen parameters; a tied one is what any of its names is."""
    patterns = options.freeze or options.train_only or ()
    check_patterns("--freeze" if options.freeze else "--train-only", patterns, names)
    matched = {name for pattern in patterns for name in matching(pattern, names)}
    if not patterns:
        return set()
    hit = [(group, bool(matched.intersection(group))) for group in groups]
    return {name for group, is_hit in hit if is_hit == bool(options.freeze) for name in group}


@functools.cache
def _kept_in_eval_mode(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of the same modules that `train()` leaves in eval mode; one class for all of a kind, so that they count as equal."""

    def train(self: nn.Module, mode: bool = True) -> Any:
        return kind.train(self, False)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__, "train": train}
    return type(kind.__name__, (kind,), names)
