"""Layouts: on which axis features lie, told by the modules that made a boundary; heads, labels and thin parts that go by it."""

import pytest
import torch
from torch import Tensor, nn

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.methods import SyntheticLabels
from lowmem_pnn.methods.heads import ChannelsFirst, make_head
from lowmem_pnn.methods.similarity import SimilarityHead
from lowmem_pnn.methods.thin_parts import make_thin_part
from lowmem_pnn.model.call_form import TensorSpec


class Permuted(nn.Module):
    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.axes)


class OverPositions(nn.Module):
    """A linear layer over positions, as in an MLP mixer, beside what passes by."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(positions, positions)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x.transpose(1, 2)).transpose(1, 2)


def axes_of(model: nn.Module, *shape: int) -> list[tuple[tuple[int, ...], int | None]]:
    chain = capture(model, TensorSpec(shape, torch.float32))
    return [(spec.shape, spec.features) for (spec,) in chain.laid_out]


SIGNALS = nn.Sequential(
    nn.Conv1d(3, 6, 5, 2, 2), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 8, 3, 2, 1), nn.Conv1d(8, 4, 8), nn.Flatten()
)
CHANNELS_LAST = nn.Sequential(
    nn.Conv2d(3, 6, 2, 2), Permuted(0, 2, 3, 1), nn.LayerNorm(6), nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4), nn.Flatten()
)
TOKENS = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.Flatten(2), Permuted(0, 2, 1), OverPositions(16), nn.Linear(6, 7))
MAPS = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), Permuted(0, 2, 3, 1), nn.Linear(8, 9), Permuted(0, 3, 1, 2), nn.Conv2d(9, 4, 1))


def test_the_modules_before_a_boundary_tell_where_its_features_are() -> None:
    assert axes_of(SIGNALS, 3, 32)[:3] == [((3, 32), 0), ((6, 16), 0), ((8, 8), 0)]
    assert axes_of(CHANNELS_LAST, 3, 16, 16)[:3] == [((3, 16, 16), 0), ((8, 8, 6), -1), ((8, 8, 10), -1)]
    # Turned to tokens; what comes back from a layer over positions is taken as before, for tokens.
    assert axes_of(TOKENS, 3, 16, 16) == [((3, 16, 16), 0), ((16, 6), -1), ((16, 6), None), ((16, 7), -1)]
    assert axes_of(MAPS, 3, 16, 16) == [((3, 16, 16), 0), ((8, 8, 8), 0), ((9, 8, 8), 0), ((4, 8, 8), 0)]


SIGNAL, LAST = TensorSpec((6, 16), torch.float32, features=0), TensorSpec((8, 12, 5), torch.float32, features=-1)
FIRST = TensorSpec((5, 8, 12), torch.float32)


@pytest.mark.parametrize("kind", ["adaptive", "classic", "auglocal", "linear"])
def test_heads_go_by_the_layout(kind: str) -> None:
    for spec, later in (
        (SIGNAL, TensorSpec((8, 8), torch.float32, features=0)),
        (LAST, TensorSpec((4, 6, 10), torch.float32, features=-1)),
    ):
        head = make_head(kind, spec, [later], 4, tokens=False)  # type: ignore[arg-type]
        assert head(torch.randn(3, *spec.shape)).shape == (3, 4)
        convolutions = [one for one in head.modules() if isinstance(one, nn.Conv1d | nn.Conv2d)]
        assert all(one.in_channels == (6 if spec is SIGNAL else 5) for one in convolutions[:1])
        assert convolutions or kind == "linear"
        assert make_head(kind, SIGNAL, [], 4, tokens=True)(torch.randn(3, 6, 16)).shape == (3, 16, 4)  # type: ignore[arg-type]
    # The same head of the same maps, whichever axis their channels are on.
    torch.manual_seed(0)
    first = make_head(kind, FIRST, [], 4, tokens=False)  # type: ignore[arg-type]
    torch.manual_seed(0)
    last = make_head(kind, LAST, [], 4, tokens=False)  # type: ignore[arg-type]
    x = torch.randn(3, *FIRST.shape)
    torch.testing.assert_close(last(x.movedim(1, -1)), first(x))


def test_pooled_labels_have_a_value_for_each_channel() -> None:
    for spec, channels, axes in ((SIGNAL, 6, (2,)), (LAST, 5, (1, 2))):
        objective = SyntheticLabels((spec,), 3, 1.0, 0, target="pooled")
        objective.prepare(torch.device("cpu"))
        assert objective.class_vectors[0].shape == (3, channels)
        outputs, labels = torch.rand(4, *spec.shape), torch.tensor([0, 2, 1, 1])
        expected = nn.functional.mse_loss(outputs.mean(axes), objective.class_vectors[0][labels])
        torch.testing.assert_close(objective.loss((outputs,), labels), expected)


def test_similarity_compares_deviations_of_channels() -> None:
    for spec, channels in ((SIGNAL, 6), (LAST, 5)):
        head = SimilarityHead(nn.Identity(), spec, scores_teach=True)
        assert head(torch.randn(3, *spec.shape))[1].shape == (3, channels)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SIGNAL, TensorSpec((8, 8), torch.float32, features=0)),
        (SIGNAL, TensorSpec((7, 9), torch.float32, features=-1)),
        (TensorSpec((7, 9), torch.float32, features=-1), SIGNAL),
        (SIGNAL, TensorSpec((4,), torch.float32)),
        (LAST, TensorSpec((4, 6, 10), torch.float32, features=-1)),
        (FIRST, TensorSpec((4, 6, 10), torch.float32, features=-1)),
        (LAST, TensorSpec((4,), torch.float32)),
    ],
)
def test_thin_parts_convolve_over_positions(before: TensorSpec, after: TensorSpec) -> None:
    part = make_thin_part(before, after, is_last=False)
    assert part is not None
    assert part(torch.randn(3, *before.shape)).shape == (3, *after.shape)
    convolution = next(one for one in part.modules() if isinstance(one, nn.Conv1d | nn.Conv2d))
    assert convolution.in_channels == before.shape[0 if before.map_shape == before.shape else -1]
    assert any(isinstance(one, ChannelsFirst) for one in part) == (before.map_shape != before.shape)  # type: ignore[attr-defined]
