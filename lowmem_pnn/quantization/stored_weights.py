"""Stored weights: frozen matrices in a smaller type than that of computing, cast to it layer by layer, as they are used.

    bf16   the upper half of each float32, rounded to nearest even: 2 bytes an element
    int8   a code from -127 to 127, and a scale (float32) for each row, the largest magnitude in it / 127: 1 byte and a little
    nf4    a code for one of 16 levels, two in a byte, and a scale for every 64 elements, the largest magnitude: 0.5625 bytes; the
           levels are quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E)

A linear layer saves its stored weight for backward, and not the cast one, which would stay in memory from forward to backward: the
gradient of its input casts it once more. Both products are those of PyTorch on the cast weight, bit for bit; but for a frozen weight of
more than `TILED_BYTES`, as a vocabulary's is, which is cast and multiplied some rows at a time: the gradient of its input is then a sum of the
rows' products, equal up to rounding.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_pnn.units import MEBIBYTE

SCALE = "_scale"
"""What is appended to the name of a weight for the name of its scales."""

NF4_BLOCK = 64
"""Number of elements that share a scale in nf4."""

NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Levels of nf4, by code."""

TILED_BYTES = 64 * MEBIBYTE
"""Bytes, as cast, from which on a frozen weight is cast some rows at a time."""

_TILE_BYTES = 16 * MEBIBYTE
# Rows of a tile are multiples of so many: whole blocks of nf4, and wide products.
_TILE_ROWS = 256

# Elements that are converted at once: few enough for a core's cache.
_PIECE = 1 << 16

_INT8_LIMIT = 127


class StoredForm(NamedTuple):
    """The way in which a matrix is kept.

    Args:
        name: `bf16`, `int8` or `nf4`.
        shape: shape of the matrix.
        dtype: type of its elements where it is computed with as the model has it.
    """

    # A tuple of plain values: layers with equal ones count as equal.
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return type and shape of the stored tensors, by what each one's name has after that of the weight."""
        size = math.prod(self.shape)
        if self.name == "bf16":
            return {"": (torch.bfloat16, self.shape)}
        if self.name == "int8":
            return {"": (torch.int8, self.shape), SCALE: (torch.float32, (self.shape[0],))}
        return {"": (torch.uint8, (math.ceil(size / 2),)), SCALE: (torch.float32, (math.ceil(size / NF4_BLOCK),))}

    def encode(self, values: Tensor) -> dict[str, Tensor]:
        """Return the stored tensors of a matrix, which is read piece by piece.

        Args:
            values: the matrix, of any floating-point type; on the meta device the results have no values either.
        """
        parts = {end: torch.empty(shape, dtype=dtype, device=values.device) for end, (dtype, shape) in self.layout().items()}
        if values.is_meta or not values.numel():
            return parts
        values = values.detach()
        with torch.no_grad():
            if self.name == "nf4":
                _encode_nf4(values.reshape(-1), parts[""], parts[SCALE])
                return parts
            rows = max(1, _PIECE * self.shape[0] // values.numel())
            for begin in range(0, self.shape[0], rows):
                piece = slice(begin, begin + rows)
                if self.name == "bf16":
                    parts[""][piece] = values[piece]
                else:
                    _encode_int8(values[piece].float(), parts[""][piece], parts[SCALE][piece])
        return parts

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the matrix in the type of computing.

        Args:
            parts: stored tensors by the names of `layout`.
            dtype: type of the result.
        """
        codes = parts[""].detach()
        if self.name == "bf16":
            return codes.to(dtype)
        out = torch.empty(self.shape, dtype=dtype, device=codes.device)
        if codes.is_meta:
            return out
        if self.name == "nf4":
            _decode_nf4(codes, parts[SCALE].detach(), out.view(-1))
            return out
        rows = max(1, _PIECE * self.shape[0] // max(1, out.numel()))
        scales = parts[SCALE].detach().reshape(-1, *[1] * (len(self.shape) - 1))
        for begin in range(0, self.shape[0], rows):
            piece = slice(begin, begin + rows)
            out[piece] = codes[piece].float() * scales[piece]
        return out

    def tiles(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yield the matrix in the type of computing, some rows at a time, each with where its rows are.

        Args:
            parts: stored tensors by the names of `layout`.
            dtype: type of the results.
        """
        columns = math.prod(self.shape[1:])
        rows = max(1, _TILE_BYTES // (columns * dtype.itemsize) // _TILE_ROWS) * _TILE_ROWS
        for begin in range(0, self.shape[0], rows):
            end = min(begin + rows, self.shape[0])
            own = StoredForm(self.name, (end - begin, *self.shape[1:]), self.dtype)
            if self.name == "nf4":
                first, last = begin * columns, end * columns
                places = {
                    "": slice(first // 2, math.ceil(last / 2)),
                    SCALE: slice(first // NF4_BLOCK, math.ceil(last / NF4_BLOCK)),
                }
            else:
                places = dict.fromkeys(("", SCALE), slice(begin, end))
            yield slice(begin, end), own.decode({name: part[places[name]] for name, part in parts.items()}, dtype)

    def is_tiled(self, dtype: torch.dtype) -> bool:
        """Decide whether the matrix is so large that it is cast some rows at a time, to a type of computing."""
        return math.prod(self.shape) * dtype.itemsize >= TILED_BYTES


def _encode_int8(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    largest = values.abs().amax(dim=tuple(range(1, values.dim()))) if values.dim() > 1 else values.abs()
    scales.copy_(largest / _INT8_LIMIT)
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales)).reshape(-1, *[1] * (values.dim() - 1))
    codes.copy_((values / divisor).round_().clamp_(-_INT8_LIMIT, _INT8_LIMIT))


def _encode_nf4(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32)
    middles = (levels[1:] + levels[:-1]) / 2
    for begin in range(0, len(values), _PIECE):
        piece = values[begin : begin + _PIECE].float()
        size = len(piece)
        blocks = F.pad(piece, (0, -size % NF4_BLOCK)).view(-1, NF4_BLOCK)
        largest = blocks.abs().amax(1)
        first = begin // NF4_BLOCK
        scales[first : first + len(largest)] = largest
        scaled = blocks / torch.where(largest > 0, largest, torch.ones_like(largest))[:, None]
        found = torch.bucketize(scaled, middles, out_int32=True).view(-1, 2)
        packed = found[:, 0] * 16 + found[:, 1]
        codes[begin // 2 : begin // 2 + math.ceil(size / 2)] = packed[: math.ceil(size / 2)]


def _decode_nf4(codes: Tensor, scales: Tensor, out: Tensor) -> None:
    # By the byte: the two levels that it stands for.
    pairs = torch.tensor([(high, low) for high in NF4_LEVELS for low in NF4_LEVELS], dtype=torch.float32, device=out.device)
    for begin in range(0, len(out), _PIECE):
        size = min(_PIECE, len(out) - begin)
        values = F.embedding(codes[begin // 2 : begin // 2 + math.ceil(size / 2)].int(), pairs).view(-1)
        blocks = F.pad(values, (0, -len(values) % NF4_BLOCK)).view(-1, NF4_BLOCK)
        first = begin // NF4_BLOCK
        out[begin : begin + size] = (blocks * scales[first : first + len(blocks), None]).view(-1)[:size]


class _Product(torch.autograd.Function):
    """The product of a linear layer with a weight that is cast twice, forward and backward, and not kept in between.

    A weight in bf16 may learn: its gradient is made in the type of computing, and rounded to bf16.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, form: StoredForm, transposed: bool, bias: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.form, ctx.transposed, ctx.dtype = form, transposed, inputs.dtype
        kind = inputs.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inputs.dtype
        # Autocast (torch 2.6) would keep its casts, which have no gradients here, for the next layer that is given this input.
        inputs, bias = inputs.to(dtype), None if bias is None else bias.to(dtype)
        ctx.learns = parts[0].requires_grad
        ctx.save_for_backward(*parts, *([inputs] if ctx.learns else []))
        by_name = dict(zip(form.layout(), parts, strict=True))
        ctx.is_tiled = form.is_tiled(dtype) and not transposed and not ctx.learns
        if ctx.is_tiled:
            result = inputs.new_empty((*inputs.shape[:-1], form.shape[0]), dtype=dtype)
            for rows, tile in form.tiles(by_name, dtype):
                result[..., rows] = F.linear(inputs, tile, None if bias is None else bias[rows])
            return result
        weight = form.decode(by_name, dtype)
        if not transposed:
            return F.linear(inputs, weight, bias)
        # As transformers' Conv1D.
        assert bias is not None
        return torch.addmm(bias, inputs.reshape(-1, inputs.shape[-1]), weight).view(*inputs.shape[:-1], weight.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        [gradient] = gradients
        form: StoredForm = ctx.form
        parts = ctx.saved_tensors[: len(form.layout())]
        rows = gradient.reshape(-1, gradient.shape[-1])
        ours = None
        by_name = dict(zip(form.layout(), parts, strict=True))
        if ctx.needs_input_grad[0] and ctx.is_tiled:
            total = rows.new_zeros((rows.shape[0], form.shape[1]))
            for place, tile in form.tiles(by_name, gradient.dtype):
                total.addmm_(rows[:, place], tile)
            ours = total.view(*gradient.shape[:-1], form.shape[1]).to(ctx.dtype)
        elif ctx.needs_input_grad[0]:
            weight = form.decode(by_name, gradient.dtype)
            product = rows.mm(weight.t() if ctx.transposed else weight)
            ours = product.view(*gradient.shape[:-1], product.shape[-1]).to(ctx.dtype)
            del weight, product
        of_bias = rows.sum(0) if ctx.needs_input_grad[3] else None
        of_parts: list[Tensor | None] = [None for _ in form.layout()]
        if ctx.learns:
            given = ctx.saved_tensors[-1].reshape(-1, ctx.saved_tensors[-1].shape[-1])
            of_parts[0] = (given.t().mm(rows) if ctx.transposed else rows.t().mm(given)).to(parts[0].dtype)
        return ours, None, None, of_bias, *of_parts


class _Rows(torch.autograd.Function):
    """The rows of a table in bf16 that learns, cast; the gradient of a row is added up as it is computed, and rounded once."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, table: Tensor, padding: int | None, dtype: torch.dtype) -> Tensor:
        ctx.padding, ctx.form = padding, (tuple(table.shape), table.dtype)
        ctx.save_for_backward(indices)
        return F.embedding(indices, table).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        [gradient] = gradients
        shape, dtype = ctx.form
        numbers, rows = ctx.saved_tensors[0].reshape(-1), gradient.reshape(-1, shape[1])
        # Without a tensor whose size follows from values: sums by the rank of each row among those that are there.
        ordered, order = numbers.sort(stable=True)
        begins = torch.ones_like(ordered, dtype=torch.bool)
        begins[1:] = ordered[1:] != ordered[:-1]
        ranks = begins.cumsum(0) - 1
        sums = torch.zeros_like(rows).index_add_(0, ranks, rows.index_select(0, order))
        # Ranks that are not there stand for row 0, and add zeros to it.
        named = torch.zeros_like(ordered).scatter_(0, ranks, ordered)
        if ctx.padding is not None:
            sums = sums * (named != ctx.padding)[:, None]
        table = torch.zeros(shape, dtype=dtype, device=rows.device).index_add_(0, named, sums.to(dtype))
        return None, table, None, None


class Stored:
    """A module whose `weight` is kept in another form; the attribute `stored` says in which."""

    stored: StoredForm

    def parts(self) -> dict[str, Tensor]:
        """Return the stored tensors."""
        return {end: getattr(self, f"weight{end}") for end in self.stored.layout()}


class _StoredLinear(Stored):
    bias: Tensor | None
    transposed: ClassVar[bool] = False

    def forward(self, inputs: Tensor) -> Tensor:
        product: Tensor = _Product.apply(inputs, self.stored, self.transposed, self.bias, *self.parts().values())
        return product


class _StoredConv1D(_StoredLinear):
    transposed: ClassVar[bool] = True


class _StoredEmbedding(Stored):
    weight: Tensor
    padding_idx: int | None

    def forward(self, indices: Tensor) -> Tensor:
        if self.weight.requires_grad:
            rows: Tensor = _Rows.apply(indices, self.weight, self.padding_idx, self.stored.dtype)
            return rows
        return F.embedding(indices, self.weight, self.padding_idx).to(self.stored.dtype)


@dataclass(frozen=True)
class StoredPart:
    """One stored tensor of a weight that is kept in another form.

    Args:
        weight: name of the weight.
        end: what the stored tensor's name has after it.
        form: the form.
    """

    weight: str
    end: str
    form: StoredForm


def stored_parts(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, StoredPart]:
    """Return the stored tensors of all weights that are kept in another form, by name.

    Args:
        modules: modules with their names in the model.
    """
    return {
        f"{name}.weight{end}": StoredPart(f"{name}.weight", end, module.stored)
        for name, module in modules
        if isinstance(module, Stored)
        for end in module.stored.layout()
    }


def num_values(module: nn.Module) -> dict[int, int]:
    """Return, for the stored tensors in a module, how many values of the model each one stands for, by the `id` of the tensor.

    Args:
        module: any module.
    """
    return {
        id(tensor): math.prod(one.stored.shape) if not end else 0
        for one in module.modules()
        if isinstance(one, Stored)
        for end, tensor in one.parts().items()
    }


def is_conv1d(module: nn.Module) -> bool:
    """Decide whether a module is a linear layer of transformers' GPT-2, whose weight is transposed."""
    return any(kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(module).__mro__)


def is_stored_linear(module: nn.Module) -> bool:
    """Decide whether a module is an `nn.Linear` whose weight is kept in another form, and nothing else."""
    return isinstance(module, _StoredLinear) and type(module) is _stored_class(nn.Linear)


def can_be_stored(module: nn.Module, *, learns: bool = False) -> bool:
    """Decide whether a module's weight may be kept in another form: a matrix of float32, with no forward but PyTorch's own.

    Args:
        module: any module.
        learns: whether matrices that learn are asked for; else those of modules that are frozen.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dtype != torch.float32 or "forward" in vars(module):
        return False
    learning = weight.requires_grad if learns else any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    if learning != learns:
        return False
    if isinstance(module, nn.Embedding):
        plain = module.max_norm is None and not module.sparse and not (learns and module.scale_grad_by_freq)
        return type(module).forward is nn.Embedding.forward and plain
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return is_conv1d(module) and module.bias is not None and type(module).__name__ == "Conv1D"


def store(module: nn.Module, form: StoredForm, parts: Mapping[str, nn.Parameter]) -> None:
    """Have a module keep its weight in another form.

    Args:
        module: a module that `can_be_stored`; it is changed.
        form: the form.
        parts: its tensors.
    """
    module.__class__ = _stored_class(type(module))  # type: ignore[arg-type]
    module.stored = form  # type: ignore[assignment]
    own = dict(module._parameters)
    module._parameters.clear()
    for name, parameter in own.items():
        if name != "weight":
            module.register_parameter(name, parameter)
            continue
        for end, part in parts.items():
            module.register_parameter(f"weight{end}", part)


@functools.cache
def _stored_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of the same modules that compute with stored weights; one class for all of a kind, so that they count as equal."""
    mixin = (
        _StoredEmbedding if issubclass(kind, nn.Embedding) else _StoredLinear if issubclass(kind, nn.Linear) else _StoredConv1D
    )
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (mixin, kind), names)
