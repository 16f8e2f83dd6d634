"""Files of pretrained weights: every kind gives the same tensors, and what is wrong with one is said in one line."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lowmem_pnn.errors import CheckpointError, ConfigError, LowMemError
from lowmem_pnn.pretrained.model_file import kept_in_fp32
from lowmem_pnn.pretrained.open_weights import WeightFiles
from lowmem_pnn.pretrained.state_dicts import GivenTensors, tensors_of
from lowmem_pnn.zoo.models import find_model

SOURCE = find_model("mlp:4-3-2", {}, 2)


def state() -> dict[str, Tensor]:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "0.weight": base,
        "0.bias": base[1:2, :3].reshape(3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "n": torch.tensor(5),
    }


def write_shards(folder: Path) -> Path:
    names = list(state())
    save_file({name: state()[name].clone() for name in names[:2]}, folder / "model-00001-of-00002.safetensors")
    # What the index does not name of a shard is not read.
    save_file(
        {**{name: state()[name].clone() for name in names[2:]}, names[0]: torch.full((3, 4), -1.0)},
        folder / "model-00002-of-00002.safetensors",
    )
    index = folder / "model.safetensors.index.json"
    weight_map = {name: f"model-0000{1 + number // 2}-of-00002.safetensors" for number, name in enumerate(names)}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def written(kind: str, folder: Path) -> Path:
    path = folder / f"{kind}.pt"
    if kind == "safetensors":
        path = folder / "model.safetensors"
        save_file({name: tensor.clone() for name, tensor in state().items()}, path)
    elif kind == "index":
        path = write_shards(folder)
    elif kind == "folder":
        write_shards(folder)
        path = folder
    elif kind == "legacy":
        torch.save(state(), path, _use_new_zipfile_serialization=False)
    elif kind == "checkpoint":
        # As PyTorch's ImageNet example has it.
        torch.save({"epoch": 3, "best_acc1": torch.tensor(71.0), "state_dict": state(), "optimizer": {"lr": 0.1}}, path)
    elif kind == "module's":
        linear = nn.Linear(4, 3)
        linear.load_state_dict({"weight": state()["0.weight"], "bias": state()["0.bias"]})
        torch.save({"model": {f"0.{name}": nn.Parameter(value) for name, value in linear.state_dict().items()}}, path)
    else:
        torch.save(state(), path)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "index", "folder", "zip", "legacy", "checkpoint", "module's"])
def test_every_kind_of_file_gives_its_tensors_bit_for_bit(kind: str, tmp_path: Path) -> None:
    weights = WeightFiles(str(written(kind, tmp_path)), SOURCE)
    expected = state() if kind != "module's" else dict(list(state().items())[:2])
    assert weights.layouts() == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in expected.items()}
    with weights.reading(tmp_path) as read:
        for name, tensor in expected.items():
            found = read(name)
            assert torch.equal(found, tensor), name
            assert (found.dtype, found.is_contiguous(), found.requires_grad) == (tensor.dtype, True, False)
    assert weights.sha256() == weights.sha256()


def test_a_changed_file_has_another_hash(tmp_path: Path) -> None:
    hashes = set()
    for value in (1.0, 2.0):
        torch.save({"a": torch.full((2,), value)}, tmp_path / "a.pt")
        hashes |= {WeightFiles(str(tmp_path / "a.pt"), SOURCE).sha256(), GivenTensors({"a": torch.full((2,), value)}).sha256()}
    index = write_shards(tmp_path)
    hashes.add(WeightFiles(str(index), SOURCE).sha256())
    save_file({"half": torch.zeros(2, dtype=torch.bfloat16), "n": torch.tensor(5)}, tmp_path / "model-00002-of-00002.safetensors")
    hashes.add(WeightFiles(str(index), SOURCE).sha256())
    assert len(hashes) == 6


def damage_index(folder: Path, text: str) -> str:
    (folder / "a.safetensors.index.json").write_text(text)
    return "a.safetensors.index.json"


def _whole_module(folder: Path) -> str:
    torch.save(nn.Linear(2, 2), folder / "a.pt")
    return "a.pt"


def _saved(folder: Path, value: Any) -> str:
    torch.save(value, folder / "a.pt")
    return "a.pt"


def _cut(folder: Path, name: str) -> str:
    path = written("safetensors" if name.endswith("safetensors") else name, folder)
    path.write_bytes(path.read_bytes()[:-9])
    return path.name


def _bytes(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return name


BAD: dict[str, tuple[Any, type[LowMemError], str]] = {
    "missing": (lambda f: "no.pt", ConfigError, r"--weights: there is no file .*no.pt; give default, or a path"),
    "empty folder": (lambda f: "", ConfigError, r"--weights: the folder .* holds none of model.safetensors, model.safetensors.index"),
    "two files": (
        lambda f: [_bytes(f, f"{n}.safetensors", b"") for n in "ab"] and "",
        ConfigError,
        r"the folder .* holds 2 weight files \(a.safetensors, \.\.\.\); give the path of one file",
    ),
    "kind": (lambda f: _bytes(f, "a.npz", b"x"), ConfigError, r"a.npz is of no known kind; give a file that ends in .safetensors,"),
    "cut safetensors": (lambda f: _cut(f, "a.safetensors"), CheckpointError, r"model.safetensors' has \d+ bytes, its header says"),
    "empty safetensors": (lambda f: _bytes(f, "a.safetensors", b""), CheckpointError, r"has 0 bytes, no room for the header's length"),
    "cut zip": (lambda f: _cut(f, "zip"), CheckpointError, r"zip.pt is no whole file of torch.save \(RuntimeError: .*\); fetch the file"),
    "cut legacy": (lambda f: _cut(f, "legacy"), CheckpointError, r"legacy.pt is no whole file of torch.save \(.*\); fetch the file again"),
    "empty": (lambda f: _bytes(f, "a.bin", b""), CheckpointError, r"a.bin is no whole file of torch.save \(EOFError\); fetch the file"),
    "words": (lambda f: _bytes(f, "a.pth", b"hello"), CheckpointError, r"a.pth is no whole file of torch.save \(.*\); fetch"),
    "whole module": (_whole_module, ConfigError, r"a.pt holds more than tensors, such as a whole module, .*; save model.state_dict\(\)"),
    "a number": (lambda f: _saved(f, 3), ConfigError, r"a.pt holds a int without tensors; give a state_dict, or a dict that has one"),
    "no tensors": (lambda f: _saved(f, {"a": 3}), ConfigError, r"a.pt holds a dict without tensors"),
    "sparse": (lambda f: _saved(f, {"a": torch.eye(2).to_sparse()}), ConfigError, r"a.pt holds sparse tensors; make them dense"),
    "no json": (lambda f: damage_index(f, "{"), CheckpointError, r"index.json' is no index of safetensors files \(.*\); fetch the file"),
    "no map": (lambda f: damage_index(f, "{}"), CheckpointError, r"is no index of safetensors files \('weight_map'\); fetch"),
    "no shard": (
        lambda f: damage_index(f, '{"weight_map": {"a": "b.safetensors"}}'),
        CheckpointError,
        r"b.safetensors' is missing, which .*index.json' names; fetch all of its files",
    ),
    "shard elsewhere": (
        lambda f: damage_index(f, '{"weight_map": {"a": "../b.safetensors"}}'),
        CheckpointError,
        r"it names '../b.safetensors', which is not beside it",
    ),
    "wrong shard": (
        lambda f: written("safetensors", f) and damage_index(f, '{"weight_map": {"a": "model.safetensors"}}'),
        CheckpointError,
        r"model.safetensors' holds no 'a', which .*index.json' says it does; fetch the file again",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_used_is_one_line(name: str, tmp_path: Path) -> None:
    make, kind, text = BAD[name]
    spec = str(tmp_path / make(tmp_path))
    with pytest.raises(kind, match=text) as raised:
        WeightFiles(spec, SOURCE).layouts()
    assert "\n" not in str(raised.value)


def test_default_is_for_models_of_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"--weights default: model mlp:4-3-2 has no weights of its own, as torchvision's and timm's"
    ):
        WeightFiles("default", SOURCE).layouts()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(state(), tmp_path / "checkpoints" / "mobilenet_v2-7ebf99e0.pth")
    weights = WeightFiles("default", find_model("mobilenet_v2", {}, 10))
    assert list(weights.layouts()) == list(state())
    assert weights.where == f"default ({tmp_path}/checkpoints/mobilenet_v2-7ebf99e0.pth)"


def test_what_is_given_from_python_is_read_as_it_is(tmp_path: Path) -> None:
    given = GivenTensors({**state(), "extra": 3})
    with given.reading(tmp_path) as read:
        assert all(torch.equal(read(name), tensor) for name, tensor in state().items())
    assert list(given.layouts()) == list(state())
    with pytest.raises(ConfigError, match="the state_dict that was given holds a dict without tensors"):
        GivenTensors({})
    for key in ("model", "ema", "module", "params_ema"):
        assert list(tensors_of({key: {"a": torch.zeros(1)}}, "x")) == ["a"]
    below = {"a": torch.zeros(1), "b": torch.zeros(1)}
    assert list(tensors_of({"model": {"state_dict": below, "hparams": {"lr": 0.1}}}, "x")) == ["a", "b"]
    assert list(tensors_of({"epoch": torch.tensor(3), "net": below, "optimizer": {"state": {0: below}}}, "x")) == ["a", "b"]
    assert list(tensors_of({"a": torch.zeros(1), "a._extra_state": below}, "x")) == ["a"]
    with pytest.raises(ConfigError, match="x holds tensors under 'net', 'ema'; give one of them"):
        tensors_of({"net": below, "ema": below}, "x")


def test_a_large_file_is_never_whole_in_memory(tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        import torch
        from safetensors.torch import save_file
        from lowmem_pnn.memory.heap import fix_malloc_thresholds
        from lowmem_pnn.pretrained.open_weights import WeightFiles
        from lowmem_pnn.zoo.models import find_model

        def private_bytes():
            return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

        fix_malloc_thresholds(100_000_000)  # as every run does
        folder = Path(sys.argv[1])
        for kind in ("safetensors", "zip", "legacy"):
            path = folder / (f"{kind}.safetensors" if kind == "safetensors" else f"{kind}.pt")
            values = {str(number): torch.full((1 << 20,), float(number)) for number in range(12)}
            if kind == "safetensors":
                save_file(values, path)
            else:
                torch.save(values, path, _use_new_zipfile_serialization=kind == "zip")
            del values
            weights = WeightFiles(str(path), find_model("mlp:4-2", {}, 2))
            before = most = private_bytes()
            weights.layouts()
            with weights.reading(folder) as read:
                most = max(most, private_bytes())
                for number in range(12):
                    tensor = read(str(number))
                    assert float(tensor[7]) == number
                    most = max(most, private_bytes())
                    del tensor
            print(kind, most - before)
    """)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    # 12 tensors of 4.2 MB are 50 MB.
    found = {kind: int(size) for kind, size in map(str.split, done.stdout.splitlines())}
    assert len(found) == 3
    assert all(size < 16e6 for size in found.values()), found


def test_which_weights_a_file_has_in_fp32(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    codes = {"b.weight": torch.ones(2, 3, dtype=torch.int8), "b.weight_scale": torch.ones(2)}
    save_file({"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2), **codes, "c.weight": torch.ones(2).bfloat16()}, file)
    assert kept_in_fp32(file) == {"a"}
    assert kept_in_fp32(tmp_path / "none") == set()
