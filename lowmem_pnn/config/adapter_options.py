"""Options of adapters, and of how weights are kept: low-rank adapters on a frozen base, and types of weights. No torch here."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Set
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from lowmem_pnn.config.faults import as_typed
from lowmem_pnn.config.finetuning_options import Patterns

# What a run trains by where adapters are asked for and nothing else is.
DEFAULTS_WITH_ADAPTERS: dict[str, Any] = {"method": "exact", "epochs": (3,), "lr": (2e-4,)}

ALL_LINEAR = "all-linear"
"""Target that stands for all linear layers but the one that makes the outputs."""

FrozenForm = Literal["fp32", "bf16", "int8", "nf4"]

_KEYS = ("r", "alpha", "targets", "dropout")


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LoraOptions:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685), with the names and defaults of peft's `LoraConfig`.

    Args:
        r: rank.
        alpha: what a product of the two matrices is scaled by, times the rank.
        targets: modules that get an adapter, by the ends of their names, or `all-linear`.
        dropout: share of an adapter's inputs that are zeroed in training.
    """

    r: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    dropout: float = 0.0

    def __str__(self) -> str:
        """Return the options as one would type them."""
        text = f"r={self.r},alpha={as_typed(self.alpha)},targets={'+'.join(self.targets)}"
        return f"{text},dropout={as_typed(self.dropout)}" if self.dropout else text

    @property
    def scaling(self) -> float:
        """Factor on the product of the two matrices."""
        # peft divides the numbers as they are typed: int by int.
        return self.alpha / self.r


def _lora(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, LoraOptions):
        value = dataclasses.asdict(value)  # whose values nobody has looked at
    given = _pairs(value) if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        raise ValueError("write r=16,alpha=32,targets=q_proj+v_proj,dropout=0.05, or what of it is to differ from the defaults")
    for key in given:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            raise ValueError(f"there is no {key!r}; give {near[0] if near else 'one of ' + ', '.join(_KEYS)}")
    targets = given.get("targets")
    targets = (ALL_LINEAR,) if targets is None else targets
    if not isinstance(targets, str | Iterable):
        raise ValueError(f"targets is {targets!r}; write names with + between them: targets=q_proj+v_proj")
    if isinstance(targets, Set):  # whose order is another in every process
        targets = sorted(map(str, targets))
    targets = tuple(part.strip() for part in (targets.split("+") if isinstance(targets, str) else map(str, targets)))
    if not targets or not all(targets):
        raise ValueError("targets has a name that is empty; write names with + between them: targets=q_proj+v_proj")
    if ALL_LINEAR in targets and len(targets) > 1:
        raise ValueError(f"targets={ALL_LINEAR} stands for all linear layers; leave the other names out")
    rank, alpha, dropout = (_number(given, key, default) for key, default in (("r", 8), ("alpha", 8), ("dropout", 0)))
    if rank < 1 or rank != int(rank):
        raise ValueError(f"r is {rank:g}, and the rank is a whole number from 1; give, for example, r=8")
    if alpha <= 0:
        raise ValueError(f"alpha is {alpha:g}, and must be above 0; give, for example, alpha={2 * int(rank)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout:g}, and must be at least 0 and below 1; give, for example, dropout=0.05")
    return LoraOptions(r=int(rank), alpha=alpha, targets=targets, dropout=dropout)


def _pairs(text: str) -> dict[str, str]:
    pairs = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"{part.strip()!r} is not KEY=VALUE; write r=16,alpha=32,targets=q_proj+v_proj,dropout=0.05")
        if key in pairs:
            raise ValueError(f"{key} is there twice; give it once")
        pairs[key] = value
    return pairs


def _number(given: Mapping[str, Any], key: str, default: float) -> float:
    value = given.get(key, default)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}, which is no number; give, for example, r=16,alpha=32,dropout=0.05")
    return number


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AdapterOptions:
    """Options of `FitConfig` that are about adapters, and about the types that weights are kept in."""

    lora: Annotated[LoraOptions | None, BeforeValidator(_lora)] = Field(
        default=None,
        description=(
            "Low-rank adapters on a frozen base: r=16,alpha=32,targets=q_proj+v_proj,dropout=0.05, with peft's names and defaults (r=8, "
            "alpha=8, dropout=0). targets: ends of the names of linear layers, or all-linear (default), which leaves out the one that makes "
            "the outputs. Only the adapters learn, and a head that is new. With it the defaults are --method exact, --epochs 3, --lr 2e-4."
        ),
    )
    modules_to_save: Patterns = Field(
        default=None,
        description=(
            "Modules that learn as a whole beside the adapters (--lora), by the ends of their names, separated by commas; by default the "
            "head, where it is new since the pretrained weights have one for another number of classes."
        ),
    )
    weights_dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description=(
            "Type that weights which learn are kept in, on disk and on the device: fp32; or bf16, of linear layers and embeddings, 2 bytes a "
            "value and what the optimizer keeps. A step is computed in fp32, and its result rounded to bf16 at random, up or down, so that "
            "small steps are not lost; gradients are bf16 too. They are cast to the type that is computed in as they are used."
        ),
    )
    frozen_dtype: FrozenForm | None = Field(
        default=None,
        description=(
            "Type of frozen weights, on disk and on the device: fp32; bf16; int8 with a scale per row, or nf4 (4 bits, in blocks of 64, as "
            "QLoRA has it), of linear layers, and then bf16 of embeddings and of the layer that makes the outputs. They are cast to the type "
            "that is computed in layer by layer, as they are used. By default fp32; with --lora and --precision bf16, bf16."
        ),
    )
