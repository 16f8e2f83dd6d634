"""Model `gpt:layers=12,width=768,...`: a small, standard decoder for language models, whose sizes are all in its name.

    ids (B, T) -> embedding -> [attention -> mlp] x layers -> norm -> head -> scores (B, T, vocab)

B samples, T tokens of each, W width, H heads. Each attention and each mlp adds to the residual stream (B, T, W), so that a chain can
be cut before every one of them with only the stream at the boundary. The head is one `nn.Linear`, a layer by itself.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.sources.imports import did_you_mean

BYTE_VOCABULARY = 256
"""Vocabulary of a model whose data set does not say its number of tokens: bytes."""

_EXAMPLE = "gpt:layers=12,width=768,heads=12,context=256"
# Deviation of every initial weight but for projections into the residual stream: Radford et al. 2019 (GPT-2), section 2.3, and the
# code that they released.
_INITIAL_DEVIATION = 0.02
# Bytes of a tensor, and of what training keeps with it, are counted in 64 bits.
_MOST_VALUES = 2**56

KeysAndValues = list[tuple[Tensor, Tensor]]
"""Keys and values (B, H, T, W / H) of the tokens up to now, of each attention."""


@dataclass(frozen=True, kw_only=True)
class GptShape:
    """Sizes of a model, as its name says them.

    Args:
        layers: Number of pairs of attention and mlp.
        width: Width of the residual stream, a multiple of `heads`.
        heads: Number of heads of each attention.
        context: Most tokens of a sample.
        dropout: Dropout, 0 <= dropout < 1, of the embedding, of attention weights and of all that is added to the residual stream.
        tied: Whether head and token embedding are one tensor.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 256
    dropout: float = 0.0
    tied: bool = True


def parse_gpt(spec: str) -> GptShape:
    """Read the sizes in a model's name.

    Args:
        spec: Name of the model: `gpt`, or `gpt:NAME=VALUE,...` with any of layers, width, heads, context, dropout and tied.

    Raises:
        ConfigError: A name is unknown or given twice, or a value is out of range.

    Example:
        >>> parse_gpt("gpt:layers=2,width=64,heads=4,tied=false")
        GptShape(layers=2, width=64, heads=4, context=256, dropout=0.0, tied=False)
    """
    known = [field.name for field in fields(GptShape)]
    given: dict[str, Any] = {}
    for pair in spec.removeprefix("gpt").removeprefix(":").split(","):
        if not pair.strip() and spec in ("gpt", "gpt:"):
            continue
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise ConfigError(f"model {spec!r}: {pair!r} is not NAME=VALUE; write, for example, {_EXAMPLE}")
        if name not in known:
            raise ConfigError(
                f"model {spec!r} has no argument {name!r}{did_you_mean(name, known)}; it accepts: {', '.join(known)}"
            )
        if name in given:
            raise ConfigError(f"model {spec!r}: {name} is given twice; give it once")
        given[name] = _value(spec, name, text)
    shape = GptShape(**given)
    if shape.width % shape.heads:
        nearest = max(round(shape.width / shape.heads), 1) * shape.heads
        raise ConfigError(
            f"model {spec!r}: a width of {shape.width} is no multiple of {shape.heads} heads; give, for example, width={nearest}"
        )
    if max(4 * shape.width, shape.context) * shape.width > _MOST_VALUES:
        raise ConfigError(
            f"model {spec!r}: a width of {shape.width} with a context of {shape.context} needs more values than a tensor can hold; "
            f"give smaller ones, for example {_EXAMPLE}"
        )
    return shape


def make_gpt(shape: GptShape, vocabulary: int) -> Callable[[], nn.Module]:
    """Return the constructor of a model.

    Args:
        shape: Sizes of the model.
        vocabulary: Number of tokens: inputs are from 0 to below it, and each token gets a score.
    """
    return lambda: GPT(shape, vocabulary)


class GPT(nn.Module):
    """Pre-norm decoder, initialised as GPT-2 (Radford et al. 2019): normal values of deviation 0.02, which for the two projections
    of each layer into the residual stream is divided by the square root of the number of such projections, 2 * layers.

    Args:
        shape: Sizes of the model.
        vocabulary: Number of tokens.
    """

    def __init__(self, shape: GptShape, vocabulary: int) -> None:
        super().__init__()
        self.embedding = Embedding(shape, vocabulary)
        # Plain containers: the cutting into layers looks into these, and leaves attention and mlp whole.
        self.blocks = nn.ModuleList()
        for _ in range(shape.layers):
            block = nn.Sequential()
            block.add_module("attention", Attention(shape))
            block.add_module("mlp", Mlp(shape))
            self.blocks.append(block)
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, vocabulary, bias=False)
        if shape.tied:
            self.head.weight = self.embedding.tokens.weight
        else:
            nn.init.normal_(self.head.weight, std=_INITIAL_DEVIATION)

    def forward(self, ids: Tensor) -> Tensor:
        """Score every token that could come next, at every position.

        Args:
            ids: Token numbers (B, T), int64; T is at most the context.

        Returns:
            Scores (B, T, vocabulary).
        """
        x: Tensor = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        # Alone at the end, so that the scores, by far the largest tensor, can be computed for a few tokens at a time.
        scores: Tensor = self.head(x)
        return scores

    def score_next(self, ids: Tensor, past: KeysAndValues) -> Tensor:
        """Score every token that could come after the last one, without computing anew what earlier tokens have left.

        Args:
            ids: Token numbers (B, T), int64: at first all of a text, later the one that has come.
            past: Keys and values of the tokens before them, of each attention; empty at first. Those of these tokens are appended.

        Returns:
            Scores (B, vocabulary).
        """
        begin = past[0][0].shape[2] if past else 0
        x = self.embedding.at(ids, begin)
        for number, block in enumerate(self.blocks):
            attention, mlp = block.children()
            assert isinstance(attention, Attention)
            x, keys_and_values = attention.after(x, past[number] if begin else None)
            past[number : number + 1] = [keys_and_values]
            x = mlp(x)
        scores: Tensor = self.head(self.norm(x[:, -1]))
        return scores


def is_unchanged(model: GPT) -> bool:
    """Decide whether all forwards of a model that `score_next` takes the place of are those of this file."""
    replaced: list[tuple[nn.Module, type[nn.Module]]] = [(model, GPT), (model.embedding, Embedding)]
    for block in model.blocks:
        children = tuple(block.children())
        if len(children) != 2:
            return False
        replaced += [(block, nn.Sequential), (children[0], Attention)]
    return all(type(module) is kind and "forward" not in vars(module) for module, kind in replaced)


class Embedding(nn.Module):
    """Embedding of tokens and their positions: the beginning of the residual stream.

    Args:
        shape: Sizes of the model.
        vocabulary: Number of tokens.
    """

    def __init__(self, shape: GptShape, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, shape.width)
        self.positions = nn.Parameter(torch.empty(shape.context, shape.width))
        self.dropout = nn.Dropout(shape.dropout)
        for weight in self.parameters():
            nn.init.normal_(weight, std=_INITIAL_DEVIATION)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed (B, T) token numbers as (B, T, W).

        Raises:
            ValueError: There are more tokens than the context has positions.
        """
        length, context = ids.shape[1], self.positions.shape[0]
        if length > context:
            raise ValueError(f"samples have {length} tokens, the model's context is {context}; give context={length}")
        x: Tensor = self.dropout(self.tokens(ids) + self.positions[:length])
        return x

    def at(self, ids: Tensor, begin: int) -> Tensor:
        """Embed (B, T) token numbers, the first of which is at a position, as (B, T, W)."""
        x: Tensor = self.dropout(self.tokens(ids) + self.positions[begin : begin + ids.shape[1]])
        return x


class Attention(nn.Module):
    """Causal self-attention, added to the residual stream.

    Args:
        shape: Sizes of the model.
    """

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.num_heads, self.dropout = shape.heads, shape.dropout
        self.norm = nn.LayerNorm(shape.width)
        self.qkv = _linear(shape.width, 3 * shape.width)
        self.projection = _linear(shape.width, shape.width, added_times=2 * shape.layers)
        self.residual_dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Add to the residual stream (B, T, W)."""
        # (B, T, 3W) -> three of (B, H, T, W / H).
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = scaled_dot_product_attention(
            queries, keys, values, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        added: Tensor = self.residual_dropout(self.projection(mixed.transpose(1, 2).flatten(2)))
        return x + added

    def after(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Add to the residual stream (B, T, W) of tokens that come after others; after some of them T is 1.

        Args:
            x: The stream.
            past: Keys and values (B, H, T', W / H) of the tokens before them; None where they are the first.

        Returns:
            The stream, and keys and values of all tokens up to now.
        """
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4).unbind(0)
        if past is None:
            # Copies: views would keep the queries too.
            keys, values = keys.contiguous(), values.contiguous()
        else:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        # One token sees all that were before it.
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=past is None)
        added: Tensor = self.residual_dropout(self.projection(mixed.transpose(1, 2).flatten(2)))
        return x + added, (keys, values)


class Mlp(nn.Module):
    """Two matrices with a GELU between them, four times as wide inside, added to the residual stream.

    Args:
        shape: Sizes of the model.
    """

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.width)
        self.up = _linear(shape.width, 4 * shape.width)
        self.down = _linear(4 * shape.width, shape.width, added_times=2 * shape.layers)
        self.residual_dropout = nn.Dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Add to the residual stream (B, T, W)."""
        added: Tensor = self.residual_dropout(self.down(nn.functional.gelu(self.up(self.norm(x)))))
        return x + added


def _linear(width_in: int, width_out: int, added_times: int = 1) -> nn.Linear:
    """Make a matrix with GPT-2's initial values; the residual stream is a sum of the outputs of `added_times` such matrices."""
    layer = nn.Linear(width_in, width_out)
    nn.init.normal_(layer.weight, std=_INITIAL_DEVIATION / added_times**0.5)
    nn.init.zeros_(layer.bias)
    return layer


def _value(spec: str, name: str, text: str) -> int | float | bool:
    """Read the value of one argument."""
    if name == "tied":
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"model {spec!r}: tied={text} is neither true nor false; give one of them")
        return text.lower() == "true"
    if name == "dropout":
        if not re.fullmatch(r"0?\.[0-9]+|0\.?", text, re.ASCII):
            raise ConfigError(f"model {spec!r}: dropout={text} is not in 0 <= dropout < 1; give, for example, dropout=0.1")
        return float(text)
    if not re.fullmatch(r"[0-9]+", text, re.ASCII) or int(text) < 1:
        raise ConfigError(f"model {spec!r}: {name}={text} is no positive whole number; write, for example, {_EXAMPLE}")
    return int(text)
