"""Building a model in mapped files, or its structure alone, is the same model as building it plainly."""

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lowmem_pnn.errors import ConfigError, DiskError
from lowmem_pnn.seeds import seeded as seeded_generators
from lowmem_pnn.zoo.deferred_init import file_backed, skeleton
from lowmem_pnn.zoo.models import find_model


class Odd(nn.Module):
    """Makes tensors in every way a constructor may: literal sizes, like others, copies, results, views."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(300, 50) * 0.02)
        self.b = nn.Parameter(torch.rand(300, 50))
        self.c = nn.Parameter(torch.full((300, 50), 0.5))
        self.d = nn.Parameter(torch.ones_like(self.a.data))
        self.e = nn.Parameter(torch.randn_like(self.a.data).t())
        self.f = nn.Parameter(torch.empty_like(self.a).fill_(3))
        self.register_buffer("g", torch.arange(20_000))
        self.register_buffer("h", self.a.data.new_full((300, 50), 7))
        self.register_buffer("i", torch.zeros(300, 50, dtype=torch.float64))
        self.register_buffer("j", torch.cat([torch.ones(100, 50), torch.zeros(100, 50)]).triu())
        self.register_buffer("k", torch.rand(2, 30, 10, 10).to(memory_format=torch.channels_last))
        self.register_buffer("l", torch.randint(0, 9, (300, 50)))
        self.register_buffer("m", torch.randn(300, 50, generator=torch.Generator().manual_seed(3)))
        self.linear = nn.Linear(50, 300)
        self.linear.weight = self.a
        nn.init.orthogonal_(self.b)
        nn.init.trunc_normal_(self.c, std=0.02)
        with torch.no_grad():
            self.f[:10] = 1


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def torchvision(name: str, **arguments: object) -> Callable[[], nn.Module]:
    return find_model(name, arguments, 10).build


BUILDS = {
    "mlp": find_model("mlp:64-256-256-10", {}, 10).build,
    "odd": Odd,
    "transformer": transformer,
    "resnet18": torchvision("resnet18"),
    "vit": lambda: VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10),
    "mobilenet_v3_small": torchvision("mobilenet_v3_small"),
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return build()


def mapped_at(tensor: Tensor, folder: Path) -> bool:
    """Whether a tensor's memory is a shared mapping of a file in `folder`."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.split()[1].endswith("s") and str(folder) in line
    return False


@pytest.mark.parametrize("name", BUILDS)
def test_file_backed_is_same_as_plain_construction(name: str, tmp_path: Path) -> None:
    plain = seeded(BUILDS[name])
    next_plain = torch.rand(3)
    with file_backed(tmp_path, at_least=4096):
        backed = seeded(BUILDS[name])
    next_backed = torch.rand(3)

    assert torch.equal(next_plain, next_backed)
    expected, found = plain.state_dict(keep_vars=True), backed.state_dict(keep_vars=True)
    assert list(expected) == list(found)
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
        assert value.dtype == found[key].dtype
        assert value.stride() == found[key].stride()
        assert value.requires_grad == found[key].requires_grad
        assert type(value) is type(found[key])
        assert mapped_at(found[key], tmp_path) == (value.nbytes >= 4096), key


def test_file_backed_keeps_ties(tmp_path: Path) -> None:
    with file_backed(tmp_path, at_least=1):
        model = Odd()
    assert model.linear.weight is model.a


def test_file_backed_tensors_train_after_the_block(tmp_path: Path) -> None:
    with file_backed(tmp_path, at_least=1):
        model = seeded(BUILDS["mlp"])
    plain = seeded(BUILDS["mlp"])
    x = torch.ones(4, 64)
    for each in (model, plain):
        each(x).square().sum().backward()
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_file_backed_leaves_no_files_and_no_mode(tmp_path: Path) -> None:
    with file_backed(tmp_path, at_least=1):
        tensor = torch.ones(1000)
        assert list(tmp_path.iterdir()) == []
        assert mapped_at(tensor, tmp_path)
    assert not mapped_at(torch.ones(1000), tmp_path)


def test_small_tensors_stay_in_memory(tmp_path: Path) -> None:
    with file_backed(tmp_path):
        small, large = torch.ones(262_143), torch.ones(262_144)
    assert not mapped_at(small, tmp_path)
    assert mapped_at(large, tmp_path)


def test_views_and_in_place_results_keep_their_storage(tmp_path: Path) -> None:
    outside = torch.zeros(10_000)
    with file_backed(tmp_path, at_least=1):
        view = outside.view(100, 100)
        view[3] = 1
        same = outside.add_(1)
        out = torch.add(outside, 1, out=outside)
    assert view.data_ptr() == same.data_ptr() == out.data_ptr() == outside.data_ptr()
    assert outside.sum() == 20_100


def test_other_devices_are_left_alone(tmp_path: Path) -> None:
    with file_backed(tmp_path, at_least=1):
        assert torch.empty(10_000, device="meta").is_meta
        assert torch.empty_like(torch.empty(10_000, device="meta")).is_meta


def test_a_full_disk_is_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(DiskError, match=r"a tensor of 4.0 MB needs a file in .* while the model is built, and .* are free there"),
        file_backed(tmp_path),
    ):
        nn.Linear(1000, 1000)


def test_a_missing_folder_is_a_disk_error(tmp_path: Path) -> None:
    with (
        pytest.raises(DiskError, match=r"No such file or directory; use a folder that can be written to"),
        file_backed(tmp_path / "none"),
    ):
        torch.zeros(10**6)


@pytest.mark.parametrize("name", ["mlp", "resnet18", "vit", "transformer"])
def test_skeleton_has_the_structure_and_no_values(name: str) -> None:
    plain, bare = seeded(BUILDS[name]), skeleton(BUILDS[name])
    expected = {key: (value.shape, value.dtype) for key, value in plain.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in bare.state_dict().items()} == expected
    assert all(value.is_meta for value in bare.state_dict().values())


def test_skeleton_keeps_ties() -> None:
    model = skeleton(Odd)
    assert isinstance(model, Odd)
    assert model.linear.weight is model.a


class ReadsValues(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1000, 1000)
        self.scale = float(self.weight.abs().max().item())


class PlainTensor(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1000, 1000)
        self.tables = {"a": [torch.arange(5)]}


class InnerTensor(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1000, 1000)
        self.settings = type("Settings", (), {})()
        self.settings.table = torch.arange(5)


class OwnDevice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000, 1000, device="cpu"))


@pytest.mark.parametrize("build", [ReadsValues, PlainTensor, InnerTensor, OwnDevice])
def test_skeleton_falls_back_to_files(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = skeleton(build, tmp_path)
    (weight,) = (value for name, value in model.named_parameters() if name == "weight")
    assert mapped_at(weight, tmp_path)
    if isinstance(model, PlainTensor):
        assert torch.equal(model.tables["a"][0], torch.arange(5))


class Draws(nn.Linear):
    """Keeps what its constructor draws from every generator, before and behind values."""

    def __init__(self) -> None:
        self.first = np.random.permutation(9).tolist()
        super().__init__(1000, 1000)
        self.on_cpu = torch.randperm(9, device="cpu").tolist()
        self.python = random.sample(range(9), 9)
        self.last = np.random.rand()


class DrawsATensor(nn.Linear):
    def __init__(self) -> None:
        super().__init__(1000, 1000)
        self.features = torch.randn(4, 9)


def test_what_a_constructor_draws_is_the_same_from_any_state() -> None:
    with seeded_generators(5):
        expected = Draws()
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)
        random.seed(state)
        found, bare = skeleton(Draws, seed=5), skeleton(DrawsATensor, seed=5)
        for name in ("first", "on_cpu", "python", "last"):
            assert getattr(found, name) == getattr(expected, name), name
        assert isinstance(bare, DrawsATensor)
        assert torch.equal(bare.features, seeded(DrawsATensor).features)
    torch.manual_seed(5)
    assert Draws().on_cpu == expected.on_cpu, "what plain PyTorch draws"


def test_a_constructor_that_seeds_needs_no_files() -> None:
    def build() -> nn.Module:
        torch.manual_seed(9)
        return BUILDS["mlp"]()

    assert all(value.is_meta for value in skeleton(build).state_dict().values())


@pytest.mark.parametrize("build", [BUILDS["mlp"], ReadsValues])
def test_skeleton_leaves_random_states_as_they_were(build: Callable[[], nn.Module]) -> None:
    def noisy() -> nn.Module:
        random.random()
        np.random.rand()
        torch.manual_seed(9)
        return build()

    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    skeleton(noisy)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_skeleton_shows_the_constructors_own_error() -> None:
    def broken() -> nn.Module:
        raise ConfigError("no such depth: 3")

    with pytest.raises(ConfigError, match="no such depth: 3"):
        skeleton(broken)
