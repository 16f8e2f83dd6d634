"""Modes of a model's modules: what the user's own `train()` and `eval()` make of them, so that layers cut out of the model do the same.

Networks often keep some of their BatchNorms in eval mode by a `train()` of their own. A layer's containers are not the user's classes,
so these methods are called on a copy of the model, and what they did is set in the layers.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from lowmem_pnn.errors import CaptureError
from lowmem_pnn.model.copies import copy_on_meta
from lowmem_pnn.model.python_state import Snapshot, attributes_of


@dataclass(frozen=True)
class Modes:
    """What a model's own `train()` and `eval()` do.

    Args:
        in_train: `training` of the modules, by name, where it is not True after `model.train()`.
        in_eval: `training` of the modules, by name, where it is not False after `model.eval()`.
        frozen: names of the parameters that `model.train()` freezes.
    """

    in_train: Mapping[str, bool] = field(default_factory=dict)
    in_eval: Mapping[str, bool] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()

    def of(self, training: bool) -> Mapping[str, bool]:
        """Return the modules that are not in the mode that was asked for, with the mode in which they are.

        Args:
            training: whether train mode was asked for.
        """
        return self.in_train if training else self.in_eval

    def inside(self, names: Collection[str]) -> "Modes":
        """Return the part that is about some modules.

        Args:
            names: names of the modules.
        """
        in_train, in_eval = (
            {name: flag for name, flag in flags.items() if name and name in names} for flags in (self.in_train, self.in_eval)
        )
        return Modes(in_train, in_eval)


def overrides(module: nn.Module, method: str) -> bool:
    """Decide whether a module has a method of its own in the place of `nn.Module`'s.

    Args:
        module: any module.
        method: name of a method of `nn.Module`.
    """
    return method in vars(module) or getattr(type(module), method) is not getattr(nn.Module, method)


def read_modes(model: nn.Module) -> Modes:
    """Find out what a model's own `train()` and `eval()` do, on a copy of it.

    Args:
        model: module that stays as it is.

    Raises:
        CaptureError: they raise, differ from one call to the next, or change what cannot be kept.
    """
    own = {name for name, module in model.named_modules() if overrides(module, "train") or overrides(module, "eval")}
    if not own:
        return Modes()
    copied = copy_on_meta(model)
    title = type(model).__name__
    try:
        copied.train()
        in_train, learning, before = _flags(copied), _learning(copied), Snapshot(copied)
        copied.eval()
        in_eval, changed = _flags(copied), before.changed(copied)
        copied.train()
        again = _flags(copied), _learning(copied)
    except Exception as error:  # whatever a user's own method raises
        raise CaptureError(f"train() or eval() of {title} raises {type(error).__name__}: {error}; mend it") from error
    if again != (in_train, learning) or before.changed(copied):
        raise CaptureError(f"train() of {title} does something else at each call; have it set modes alone")
    if unfrozen := sorted(learning - _learning(model)):
        raise CaptureError(
            f"train() of {title} makes {unfrozen[0]!r} learn, which is frozen before; have its constructor do that"
        )
    for name, attribute in changed:
        if name not in own:
            kind = type(attributes_of(copied).get((name, attribute))).__name__
            raise CaptureError(
                f"train() or eval() of {title} changes {attribute!r} ({kind}) of module {name!r}, which is not kept when the model is cut; "
                f"give {type(copied.get_submodule(name)).__name__} a train() that does it"
            )
    return Modes(
        {name: flag for name, flag in in_train.items() if not flag},
        {name: flag for name, flag in in_eval.items() if flag},
        frozenset(_learning(model) - learning),
    )


def _flags(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules(remove_duplicate=False)}


def _learning(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
