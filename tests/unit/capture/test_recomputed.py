"""Recomputed values: masks, positions and rotary tables, which every layer makes for itself, and which need not cross a cut."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from helpers.networks import FromFunction, assert_cut_anywhere, assert_equal, layer_names, vector
from lowmem_pnn.capture.capture import capture
from lowmem_pnn.model.chain import TensorSpec

IDS = TensorSpec((6,), torch.int64)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Rotary(nn.Module):
    """A table of angles, of which only the positions are read; the hidden state tells its type."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.rand(4), persistent=False)

    @torch.no_grad()
    def forward(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[:, :, None].float() * self.frequencies
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        turned = torch.cat([x[..., :4] * table[0], x[..., 4:] * table[1]], -1)
        scores = self.a(turned) @ x.transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -1e4)
        hidden: Tensor = x + self.b(scores.softmax(-1) @ x)
        return hidden


class Decoder(nn.Module):
    """A decoder that is told positions by what it counts, and where there is padding by its second input."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.rotary, self.head = nn.Embedding(9, 8), Rotary(), nn.Linear(8, 9)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, ids: Tensor, kept: Tensor | None = None) -> Tensor:
        hidden = self.words(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        table = self.rotary(hidden, positions)
        mask = positions[:, :, None] >= positions[:, None]
        mask = mask.expand(ids.shape[0], -1, -1) if kept is None else mask & kept[:, None, :].bool()
        for block in self.blocks:
            hidden = block(hidden, table, mask)
        return self.head(hidden)


def ids(batch: int) -> Tensor:
    return torch.arange(batch * 6).reshape(batch, 6) * 5 % 9


def test_tables_and_masks_of_sizes_do_not_cross() -> None:
    model = Decoder()
    chain = capture(model, IDS)
    assert layer_names(chain) == ["words", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert [len(specs) for specs in chain.boundaries] == [1] * 6
    for batch in (1, 2, 7):
        assert_equal(chain, model, ids(batch))
    # Every layer that uses the table has the buffer, and no cut is forbidden for it.
    assert [name for layer in chain.layers for name in layer.buffers()] == ["rotary.frequencies"] * 3
    assert chain.tied_ranges == ()
    assert_cut_anywhere(chain, ids(3))


def test_a_mask_is_made_in_each_layer_from_the_input_that_crosses() -> None:
    model = Decoder()
    kept = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    chain = capture(model, (IDS, IDS))
    assert layer_names(chain) == ["words", "blocks.0", "blocks.1", "blocks.2", "head"]
    # The mask of an integer for each position, not of one for each pair of them.
    assert [sorted(str(spec) for spec in specs)[-1] for specs in chain.boundaries[1:4]] == ["(6,) int64"] * 3
    assert [len(specs) for specs in chain.boundaries] == [2, 2, 2, 2, 1, 1]
    for batch in (1, 3):
        expected = model(ids(batch), kept[:batch])
        assert torch.equal(chain(ids(batch), kept[:batch]), expected)


def test_a_changed_buffer_is_used_in_one_place() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            return torch.ones(x.shape[0], 4) * self.seen

    model = FromFunction(
        lambda m, x: m.c(m.b(m.a(x)) + m.counts(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2), counts=Counts()
    )
    chain = capture(model, vector(4))
    assert [name for layer in chain.layers for name in layer.buffers()] == ["counts.seen"]
    assert_equal(chain, model, torch.randn(3, 4))


def test_an_integer_input_that_is_changed_in_place_is_not_read_again() -> None:
    def forward(m: Any, ids: Tensor) -> Tensor:
        is_word = ids > 2
        hidden = m.words(ids.clamp_(max=5))
        return m.head(m.block(hidden) * is_word[..., None] + ids[..., None])

    model = FromFunction(forward, words=nn.Embedding(9, 8), block=nn.Linear(8, 8), head=nn.Linear(8, 2))
    chain = capture(model, IDS)
    expected = model(ids(3))
    assert torch.equal(chain(ids(3)), expected)


def test_a_forward_decides_by_what_depends_on_sizes_alone() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1)
        mask = steps.diff() != 1
        if isinstance(mask, fx.Proxy | FakeTensor) or mask.any():
            raise AssertionError("the eager model does not come here")
        x = m.a(x) * int(steps.max())
        return m.c(m.b(x) + float(steps.sum() / x.shape[0]))

    model = FromFunction(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2))
    chain = capture(model, vector(4))
    assert layer_names(chain) == ["a", "b", "c"]
    for batch in (1, 5):
        assert_equal(chain, model, torch.randn(batch, 4))


def test_a_mask_that_samples_are_written_into_has_no_values() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        shifted = torch.zeros(x.shape[0], 5, device=x.device)
        shifted[:, 1:] = x
        return m.c(m.b(m.a(shifted[:, :4])) + shifted[:, 1:])

    model = FromFunction(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2))
    chain = capture(model, vector(4))
    assert layer_names(chain) == ["a", "b", "c"]
    assert_equal(chain, model, torch.randn(3, 4))


@functools.lru_cache
def cached_index(side: int) -> Tensor:
    index = torch.zeros(side, dtype=torch.int64)
    index[1:] = torch.arange(side - 1)
    return index


def test_what_a_forward_caches_outside_of_its_modules_is_no_fake_tensor() -> None:
    model = FromFunction(
        lambda m, x: m.c(m.b(m.a(x))[:, cached_index(4)]), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 2)
    )
    chain = capture(model, vector(4))
    assert not isinstance(cached_index(4), FakeTensor)
    assert_equal(chain, model, torch.randn(3, 4))


def test_modules_made_in_a_forward_are_opened() -> None:
    model = FromFunction(lambda m, x: m.b(nn.ReLU()(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 2))
    chain = capture(model, vector(4))
    assert layer_names(chain) == ["a", "b"]
    assert_equal(chain, model, torch.randn(3, 4))


def test_caches_of_keys_and_values_are_off() -> None:
    class Config:
        use_cache = True

    def forward(m: Any, x: Tensor) -> Tensor:
        cache: list[Tensor] | None = [] if m.config.use_cache else None
        for block in m.blocks:
            x = block(x)
            if cache is not None:
                cache.append(x)
        return x

    model = FromFunction(forward, blocks=nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]))
    model.config = Config()
    chain = capture(model, vector(4))
    assert [len(specs) for specs in chain.boundaries] == [1] * 4
    assert model.config.use_cache
    assert_equal(chain, model, torch.randn(3, 4))


def test_products_of_experts_have_shapes_in_float32() -> None:
    if not hasattr(F, "grouped_mm"):
        pytest.skip("PyTorch has no grouped products yet")

    def shape() -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
        ends = torch.tensor([2, 5, 10], dtype=torch.int32)
        product = F.grouped_mm(torch.ones(10, 8), torch.ones(3, 8, 12), offs=ends)
        return product.shape, product.stride(), product.dtype

    with FakeTensorMode():
        fake = shape()
    assert fake == shape()


class Patches(nn.Module):
    """Returns the sizes of what it makes, as numbers, and nothing in the place of attention maps."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int], None]:
        return self.a(x), (x.shape[1], 2), None


def test_numbers_that_a_block_returns_do_not_cross() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x, sizes, maps = m.patches(x)
        assert maps is None
        return m.d(m.c(x).unflatten(1, (sizes[0], sizes[1]))).flatten(1)

    model = FromFunction(forward, patches=Patches(), c=nn.Linear(4, 8), d=nn.Linear(2, 2))
    chain = capture(model, vector(4))
    assert layer_names(chain) == ["patches", "c", "d"]
    assert_equal(chain, model, torch.randn(3, 4))
