"""Merging: the weights of a trained model as its own class has them, adapters added in and stored weights decoded, some rows at a time."""

import math
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from lowmem_pnn.adapters.lora import ADAPTER_NAMES, Adapter
from lowmem_pnn.adapters.prepared_model import adapter_modules
from lowmem_pnn.model.chain import Chain
from lowmem_pnn.quantization.stored_weights import NF4_BLOCK, StoredPart, is_conv1d, stored_parts
from lowmem_pnn.stores.header import TensorLayout

ReadElements = Callable[[str, slice | None], Tensor]
"""Reads a trained tensor by its name, or some of its elements."""

# Elements that are decoded and added up at once.
_PIECE = 1 << 20


class MergedWeights:
    """Weights of a model that was trained with adapters, or with frozen weights in a smaller type, without either.

    Args:
        chain: the model in layers, as it was trained.
        read: reads its trained tensors.
    """

    layout: dict[str, TensorLayout]
    """Element type and shape of each tensor of the model's own `state_dict`, in its order."""

    def __init__(self, chain: Chain, read: ReadElements) -> None:
        self._chain = chain
        self._read = read
        self._parts: Mapping[str, StoredPart] = stored_parts(chain.modules())
        self._adapters = adapter_modules(chain.modules())
        tensors = {
            alias: tensor for layer in chain.layers for alias, tensor in (*layer.parameters().items(), *layer.buffers().items())
        }
        left_out = {f"{module}.{own}" for module in self._adapters for own in ADAPTER_NAMES}
        left_out |= {name for name, part in self._parts.items() if part.end}
        self.layout = {}
        for name in chain.persistent:
            if name in left_out:
                continue
            if (part := self._parts.get(name)) is not None:
                self.layout[name] = (part.form.dtype, part.form.shape)
            elif (tensor := tensors.get(name, tensors.get(chain.owner_of(name)))) is not None:
                self.layout[name] = (tensor.dtype, tuple(tensor.shape))
            else:  # nothing depends on it
                kept = read(name, None)
                self.layout[name] = (kept.dtype, tuple(kept.shape))

    @property
    def changes_something(self) -> bool:
        """Whether the model has adapters, or weights in a smaller type."""
        return bool(self._parts or self._adapters)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield the elements of a tensor in their order, some at a time.

        Args:
            name: name of the tensor, one of `layout`.
        """
        dtype, shape = self.layout[name]
        module, _, own = name.rpartition(".")
        adapter = self._adapters.get(module) if own == "weight" else None
        if adapter is None and name not in self._parts:
            yield self._read(self._chain.owner_of(name), None)
            return
        total, columns = math.prod(shape), math.prod(shape[1:])
        # Whole rows, and whole blocks that share a scale.
        unit = columns * (NF4_BLOCK // math.gcd(columns, NF4_BLOCK))
        size = max(1, _PIECE // max(1, unit)) * unit
        delta = None if adapter is None else self._delta(module, adapter)
        for begin in range(0, total, max(1, size)):
            elements = slice(begin, min(total, begin + size))
            values = self._values(name, elements, columns)
            if delta is not None:
                added = delta(slice(begin // columns, elements.stop // columns))
                values = (values.view(-1, columns).to(added.dtype) + added).view(-1)
            yield values.to(dtype)

    def _values(self, name: str, elements: slice, columns: int) -> Tensor:
        """Return some elements of a weight as it was kept, without its adapter."""
        part = self._parts.get(name)
        if part is None:
            return self._read(self._chain.owner_of(name), elements)
        form = part.form
        begin, end, step = elements.start, elements.stop, {"bf16": 1, "int8": columns, "nf4": NF4_BLOCK}[form.name]
        of_codes = slice(begin // 2, math.ceil(end / 2)) if form.name == "nf4" else elements
        parts = {"": self._read(self._chain.owner_of(name), of_codes)}
        rows = (end - begin) // columns
        for ending in list(form.layout())[1:]:
            parts[ending] = self._read(self._chain.owner_of(f"{name}{ending}"), slice(begin // step, math.ceil(end / step)))
        piece = form._replace(shape=(rows, columns))
        if form.name != "nf4":
            parts[""] = parts[""].view(rows, columns)
        return piece.decode(parts, form.dtype).reshape(-1)

    def _delta(self, module: str, adapter: Adapter) -> Callable[[slice], Tensor]:
        """Return a function of the rows of a weight that gives what the adapter adds to them."""
        first, second = (self._read(self._chain.owner_of(f"{module}.{own}"), None) for own in ADAPTER_NAMES)
        if is_conv1d(adapter):  # type: ignore[arg-type]
            return lambda rows: (second @ first[:, rows]).t() * adapter.lora_scaling
        return lambda rows: (second[rows] @ first) * adapter.lora_scaling
