"""Models as people bring them: held by other modules, asking for sizes, with weights that nothing uses; bit-equal to plain PyTorch."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torchvision.models.resnet import BasicBlock, ResNet

import lowmem_pnn
from helpers.exact_runs import COMMON, fit
from helpers.plainloops import assert_same_weights, built, loaded, make_optimizer, train_by_exact, training_split
from helpers.small_networks import images, vectors
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import CaptureError
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.seeds import permutation_of


class Net(nn.Module):
    """Has no containers, asks for sizes, and makes a mask of the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, width = x.shape
        if width != 12 or x.dim() != 2:
            raise ValueError(f"12 features, not {width}")
        mask = torch.ones(batch, width, device=x.device) * torch.arange(width, device=x.device) / width
        scores: Tensor = self.c((self.b(self.norm(self.a(x)).relu()) * mask).view(x.size(0), -1))
        return scores


class Holder(nn.Module):
    """Holds a model, with a pooler that nothing uses and a head that is called for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()
        self.pooler = nn.Linear(12, 3)
        self.auxiliary = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 2))

    def forward(self, x: Tensor) -> Tensor:
        self.auxiliary(x)
        scores: Tensor = self.model((x - 0.5) / 0.25)
        return scores


class Residual(nn.Module):
    """Blocks that hand on two tensors inside, in a stage that loops over its children."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return x + self.second(self.first(x).relu()) * scale


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for number in range(3):
            self.add_module(f"block{number}", Residual())

    def forward(self, x: Tensor) -> Tensor:
        for block in self.children():
            x = block(x, 0.5)
        return x


class Experts(nn.Module):
    """A mixture of experts, each of which is called on the rows that are routed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(12, 2), nn.ModuleList(nn.Linear(12, 12) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen, mixed = self.gate(x).softmax(-1), x[:, 0].argsort() % 2, torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().squeeze(-1)
            mixed = mixed.index_add(0, rows, expert(x[rows]) * weights[rows, number, None])
        return x + mixed


class Skips(nn.Module):
    """Drops blocks at random, and asks an expert only for samples of its own, of which a batch may have none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.rare, self.last = (
            nn.ModuleList(nn.Linear(12, 12) for _ in range(4)),
            nn.Linear(12, 12),
            nn.Linear(12, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if not self.training or torch.rand(()) > 0.4:
                x = x + block(x).relu()
        rows = (x[:, 0] > 1.5).nonzero()[:, 0]
        if rows.numel():
            x = x.index_add(0, rows, self.rare(x[rows]))
        scores: Tensor = self.last(x)
        return scores


class FixedPoint(nn.Module):
    """Iterates until what it computes stays, and stops some features by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, z = x.clone(), torch.zeros_like(x)
        x[x > 1] *= 0.5
        with torch.no_grad():
            for _ in range(20):
                last, z = z, torch.tanh(self.a(z) / 2 + self.b(x))
                if (z - last).norm() < 1e-2:
                    break
        scores: Tensor = self.c(torch.tanh(self.a(z) / 2 + self.b(x)) + (torch.randn_like(z) if torch.rand(()) < 0.5 else 0))
        return scores


class Packed(nn.Module):
    """Sequences of lengths of their own, of at least one, in a packed form."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.rnn, self.last = kind(3, 6, batch_first=True, bidirectional=True), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        lengths = x.ne(0).sum(1) // 4 - x[:, 0].gt(0).long()
        packed = pack_padded_sequence(x.view(-1, 4, 3), lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=4)
        scores: Tensor = self.last(outputs.sum(1))
        return scores


class Padded(nn.Module):
    """A transformer that is told which tokens are padding, takes nested tensors in eval mode, and looks at one or all tokens at the end."""

    def __init__(self, token: int | None = None) -> None:
        super().__init__()
        self.token = token
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), 2)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.view(-1, 2, 6)
        padding = torch.stack([torch.zeros(len(x), dtype=torch.bool), x[:, 0] > 0], 1)
        encoded = self.encoder(tokens, src_key_padding_mask=padding)
        scores: Tensor = self.last(encoded.mean(1) if self.token is None else encoded[:, self.token])
        return scores


class Averages(nn.Module):
    """Holds an average of a weight, which its forward moves: a teacher that follows its pupil."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight, self.how = nn.Parameter(torch.eye(12)), how
        self.average = nn.Parameter(torch.eye(12), requires_grad=how == "no gradient")

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.training and self.how == "assigned":
                self.average.data = 0.5 * self.average.data + 0.5 * self.weight.data
            elif self.training:
                average = self.average.data if self.how == "data" else self.average
                average.mul_(0.5).add_(self.weight, alpha=0.5)
            followed = x @ self.average
        return torch.tanh(x @ self.weight) + followed


class Checkpointed(nn.Module):
    """Blocks whose activations are not kept, with a BatchNorm that would count each batch twice."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2)) for _ in range(3)
        )
        self.last, self.how = nn.Linear(12, 4), how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.how(block, x)
        scores: Tensor = self.last(x)
        return scores


class TakesValues(nn.Module):
    """Computes by its weights' values too, by ways that gradients do not go; and from the third call on by another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale, self.calls = nn.Parameter(torch.randn(12, 12) / 4), nn.Parameter(torch.ones(12)), 0
        self.later = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        with torch.no_grad():
            turned = self.weight.t()
        x = torch.relu((nn.functional.linear(x, self.weight.detach()) * self.scale.data) @ turned)
        x = self.later(x) if self.calls > 2 else x
        return nn.functional.linear(x, self.weight) * self.scale


class TakesLaterValues(nn.Module):
    """Computes by the values of a weight that learns in a later layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.a(x).relu(), self.b.weight.detach()).relu()
        scores: Tensor = self.c(self.b(x))
        return scores


class Tells(Display):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


BROUGHT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "held, with unused weights": (Holder, "model.b,model.c"),
    "children in a loop": (lambda: nn.Sequential(Stage(), nn.Linear(12, 4)), "0.block1,0.block2"),
    "rows by values": (lambda: nn.Sequential(nn.Linear(12, 12), Experts(), nn.Linear(12, 4)), "1,2"),
    "conditions on values": (FixedPoint, ""),
    "packed sequences": (lambda: Packed(nn.LSTM), ""),
    "packed sequences of a GRU": (lambda: nn.Sequential(nn.Linear(12, 12), Packed(nn.GRU)), "1"),
    "padding in nested tensors": (Padded, "last"),
    "a piece of a tensor": (lambda: Padded(0), "last"),
    "values of weights": (lambda: nn.Sequential(nn.Linear(12, 12), TakesValues(), nn.Linear(12, 4)), "2"),
    "values of a later partition": (TakesLaterValues, "b"),
    "compiled as a whole": (
        lambda: torch.compile(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)), backend="eager"),
        "_orig_mod.2",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", BROUGHT)
def test_what_people_bring_is_trained_as_plain_pytorch_trains_it(case: str, tmp_path: Path) -> None:
    build, cuts = BROUGHT[case]
    # Weights decay, but for those without a gradient.
    options: dict[str, Any] = {**COMMON, "weight_decay": 0.1}
    expected = train_by_exact(build, vectors(), **options)
    result = fit(build, vectors(), tmp_path / "run", **({"cuts": cuts} if cuts else {}), **options)
    assert len(result.partitions) == len(list(filter(None, cuts.split(",")))) + 1
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss
    assert any("torch.compile around the model" in note for note in result.notes) == (case == "compiled as a whole")


class Shares(nn.Module):
    """Drops a block at random, which may be another one's too."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x).relu() if not self.training or torch.rand(()) > 0.5 else x


def sharing() -> nn.Module:
    block = nn.Linear(12, 12)
    return nn.Sequential(nn.Linear(12, 12), *(Shares(block) for _ in range(3)), nn.Linear(12, 4))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_norm": 0.5},
        {"optimizer": "sgd", "momentum": 0.0, "lr": 0.05},
        {"micro_batch": 3},
        {"micro_batch": 3, "cuts": "2,3"},
        {"clip_norm": 0.5, "cuts": "2,3"},
        {"optimizer": "adam", "weight_decay": 0.1},
    ],
    ids=str,
)
def test_what_a_batch_goes_past_takes_no_step(options: dict[str, Any], tmp_path: Path) -> None:
    cuts = options.get("cuts", "1")
    build = sharing if "," in cuts else lambda: nn.Sequential(nn.Linear(12, 12), Skips())
    options = {**COMMON, "weight_decay": 0.1, **{name: value for name, value in options.items() if name != "cuts"}}
    expected = train_by_exact(
        build, vectors(), **({"micro_batch_of": lambda step: 3} if "micro_batch" in options else {}), **options
    )
    result = fit(build, vectors(), tmp_path / "run", cuts=cuts, **options)
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


def nn_call(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x)
    return y


@pytest.mark.parametrize(
    "how",
    [
        functools.partial(checkpoint, use_reentrant=False),
        functools.partial(checkpoint, use_reentrant=True, preserve_rng_state=True),
        lambda block, x: checkpoint_sequential(block, 2, x, use_reentrant=False),
    ],
    ids=["not reentrant", "reentrant", "sequential"],
)
def test_checkpointing_of_ones_own_is_left_out(how: Callable[[nn.Module, Tensor], Tensor], tmp_path: Path) -> None:
    expected = train_by_exact(lambda: Checkpointed(nn_call), vectors(), **COMMON)
    result = fit(lambda: Checkpointed(how), vectors(), tmp_path / "run", cuts="blocks.1.0,last", **COMMON)
    assert any("the model's own activation checkpointing (torch.utils.checkpoint) is left out" in note for note in result.notes)
    assert_same_weights(loaded(lambda: Checkpointed(nn_call), result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


@pytest.mark.parametrize("how", ["frozen", "no gradient", "data", "assigned"])
@pytest.mark.parametrize("cuts", ["1", "1,2"])
def test_an_average_of_weights_follows_them(how: str, cuts: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 12), Averages(how), Averages(how), nn.Linear(12, 4))

    expected = train_by_exact(build, vectors(), **COMMON)
    result = fit(build, vectors(), tmp_path / "run", cuts=cuts, **COMMON)
    assert_same_weights(loaded(build, result.weights_file), expected.model)
    assert result.train_loss == expected.train_loss


def test_unused_weights_are_said_and_kept(tmp_path: Path) -> None:
    said = Tells()
    result = fit(Holder, vectors(), tmp_path / "run", display=said, **COMMON)
    note = (
        "'pooler.weight' and 5 more parameters get no gradient, since the output does not depend on them: kept as they are, as in plain "
        "PyTorch"
    )
    assert note in result.notes
    assert note in said.messages
    first = built(Holder, COMMON["seed"])
    found = load_file(result.weights_file)
    for name in ("pooler.weight", "auxiliary.0.weight", "auxiliary.1.weight"):
        assert torch.equal(found[name], first.get_parameter(name))
    assert not torch.equal(found["auxiliary.0.running_mean"], first.auxiliary[0].running_mean)


class Returns(nn.Module):
    """Returns a dict of scores and of what they were made from."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.first(x).relu()
        return {"hidden": hidden, "scores": self.second(hidden)}


class Scores(Returns):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)["scores"]


def loss_of_scores(outputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs["scores"], targets)


def test_a_loss_of_ones_own_takes_a_dict(tmp_path: Path) -> None:
    expected = train_by_exact(Scores, vectors(), **COMMON)
    result = fit(Returns, vectors(), tmp_path / "run", loss=loss_of_scores, cuts="second", **COMMON)
    assert_same_weights(loaded(Returns, result.weights_file), expected.model)


class ReturnsItsLoss(Returns):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = super().forward(x)
        return {"loss": outputs["scores"].square().mean(), **outputs}


def test_a_model_that_returns_its_own_loss_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        CaptureError, match=r"returns its own loss, one number for a batch: leave what it makes it of \(labels\) out"
    ):
        fit(ReturnsItsLoss, vectors(), tmp_path / "run", loss=loss_of_scores, **COMMON)


class Maps(nn.Module):
    """Returns a map with its channels last, of whose places a loss looks at some."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.map, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 7, 1), nn.Conv2d(8, 7, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x).relu()
        return self.map(x).permute(0, 2, 3, 1), self.last(x).permute(0, 2, 3, 1)


def loss_of_places(outputs: tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
    parts = [nn.functional.cross_entropy(out[:, 1, 2], labels) + out[..., 0].sigmoid().square().mean() for out in outputs]
    return parts[0] + parts[1]


def test_gradients_cross_a_cut_in_the_layout_in_which_they_were_made(tmp_path: Path) -> None:
    x, labels = images()
    result = fit(Maps, (x, labels), tmp_path / "run", loss=loss_of_places, cuts="map,last", shuffle=False, **COMMON)
    model = built(Maps, COMMON["seed"]).train()
    split = training_split((x, labels), **COMMON)
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", method="exact", shuffle=False, **COMMON)
    optimizer = make_optimizer(config, 0, list(model.parameters()))
    order = permutation_of(len(split), config.seed, "own order")
    for _ in range(COMMON["epochs"]):
        for begin in range(0, len(order), COMMON["batch_size"]):
            samples, targets = split.batch(order[begin : begin + COMMON["batch_size"]])
            loss_of_places(model(samples), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(loaded(Maps, result.weights_file), model)


def test_blocks_are_cut_apart_for_exact_and_kept_for_pnn(tmp_path: Path) -> None:
    x, y = torch.rand(24, 3, 32, 32), torch.arange(24) % 4
    build = lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)  # noqa: E731
    options = {"max_gpu_mem": "1GB", "device": "cpu", "batch_size": 8}
    of_fit = {"test": (x, y), "metrics": None, "callbacks": [], "workdir": tmp_path / "run", "resume": False, "verbose": True}
    exact = lowmem_pnn.plan(build, (x, y), method="exact", timing=False, **options, **of_fit)
    assert not (tmp_path / "run").exists()
    pnn = lowmem_pnn.plan(build, (x, y), method="pnn", timing=False, **options)
    assert [name for part in exact.partitions for name in part["layers"]][-3:] == ["layer4.0.conv1", "layer4.0.conv2", "fc"]
    assert [name for part in pnn.partitions for name in part["layers"]][-3:] == ["layer3.0", "layer4.0", "fc"]
