"""After training: trained weights in a model of one's own, models built anew, and exports in each format, which are compared."""

import copy
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowmem_pnn as package
from helpers.commands import lowmem_pnn, train, write_data
from lowmem_pnn.errors import BudgetError, CheckpointError, ConfigError
from lowmem_pnn.inference import load as models
from lowmem_pnn.reporting.result import Result

SMALL: dict[str, Any] = {"max_gpu_mem": "100MB", "device": "cpu", "epochs": 1, "method": "exact", "compare": False}


class Tied(nn.Module):
    """Tokens to scores of tokens, by one matrix, in and out; with a buffer that is in no file, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.out = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.out.weight = self.embedding.weight
        self.spare = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.full((8,), 2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.inner(self.embedding(x)) * self.scale))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run, in two partitions, of a model whose first and last weights are one."""
    x = torch.randint(0, 12, (20, 6), generator=torch.Generator().manual_seed(0))
    return package.fit(Tied, (x, x.roll(-1, 1)), workdir=tmp_path_factory.mktemp("tied") / "run", partitions=2, **SMALL)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a model that a file's function builds, by layers with exits."""
    folder = tmp_path_factory.mktemp("named")
    write_data(folder / "data.npz")
    (folder / "net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = train("--method neuroflux --heads linear", "net.py:net")
    assert done.code == 0, done.err
    return folder


@pytest.fixture
def elsewhere(tied: Result, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run as a process knows it that has not trained it."""
    monkeypatch.setattr(models, "_GIVEN", {})
    return Path(tied.workdir)


TOKENS = torch.arange(12).reshape(2, 6)


# Loading.


def test_weights_are_loaded_into_a_model_of_ones_own(tied: Result) -> None:
    model = Tied()
    assert tied.load(model) is model
    saved = load_file(tied.weights_file)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert model.out.weight is model.embedding.weight


def test_all_that_differs_is_named(tied: Result) -> None:
    other = nn.ModuleDict({"embedding": nn.Embedding(12, 9), "inner": nn.Linear(8, 8), "more": nn.Linear(1, 1)})
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError) as caught:
        tied.load(other)
    assert str(caught.value) == (
        f"'{tied.weights_file}' cannot be loaded into ModuleDict: the file lacks 'more.weight', 'more.bias'; the model lacks "
        "'out.weight', 'spare'; shapes differ: 'embedding.weight' (12, 8) in the file and (12, 9) in the model; give the model that was "
        "trained"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())  # those that fit, too


def test_what_holds_no_values_is_refused(tied: Result) -> None:
    with torch.device("meta"):
        empty = Tied()
    with pytest.raises(
        ConfigError, match=r"^'spare' of Tied is on the meta device, where values get lost; build the model with v"
    ):
        tied.load(empty)
    with pytest.raises(ConfigError, match=r"^weights are loaded into a torch\.nn\.Module, and dict is none; give the model$"):
        tied.load({})  # type: ignore[arg-type]


def test_a_model_is_built_anew_with_its_weights(tied: Result, elsewhere: Path) -> None:
    with torch.no_grad():
        expected = tied.load(Tied())(TOKENS)
        for model in (Tied, Tied()):
            loaded = package.load(elsewhere, model)
            assert torch.equal(loaded(TOKENS), expected)
            assert (loaded is model, loaded.training) == (isinstance(model, nn.Module), False)
    with pytest.raises(ConfigError) as caught:
        package.load(elsewhere)
    assert str(caught.value) == (
        "this run was started from Python with its own model (python:Tied), which no name leads to; give it again, from Python: "
        f"lowmem_pnn.load('{elsewhere}', model=...)"
    )


def test_models_of_this_process_are_remembered_and_hold_the_trained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(4, 2)
    x = torch.rand(12, 4)
    (tmp_path / "later").mkdir()
    monkeypatch.chdir(tmp_path)
    result = package.fit(model, (x, torch.arange(12) % 2), workdir="run", **SMALL)
    monkeypatch.chdir("later")
    assert result.history["epoch"] == [1], "the run is found from elsewhere too"
    loaded = package.load(tmp_path / "run")
    assert torch.equal(loaded.weight, load_file(result.weights_file)["weight"])
    assert torch.equal(model.weight, loaded.weight)
    assert loaded is not model
    assert np.array_equal(package.predict(result, x)["scores"], loaded(x).detach().numpy())


def test_python_state_of_modules_comes_back(tmp_path: Path) -> None:
    class Cools(nn.Linear):
        heat = 1.0

        def forward(self, x: Tensor) -> Tensor:
            self.heat = self.heat * 0.5 if self.training else self.heat
            return super().forward(x) / self.heat

    net = lambda: nn.Sequential(Cools(4, 3), nn.ReLU(), nn.Linear(3, 2))  # noqa: E731
    given, x = net(), torch.rand(12, 4)
    result = package.fit(given, (x, torch.arange(12) % 2), workdir=tmp_path / "run", **SMALL)
    assert result.module_state["0.heat"] < 1
    expected = torch.from_numpy(package.predict(result, x)["scores"])
    program = torch.export.load(package.export(result, to="pt2")["file"]).module()
    for model in (package.load(result), result.load(net()).eval(), given.eval(), program):
        assert torch.allclose(model(x), expected)


def test_code_is_run_only_where_it_is_named_or_trusted(named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(named)
    message = rf"^the run in run would run code from {named}/net\.py:net; give --trust$"
    for attempt in (package.load, package.predict, package.export):
        with pytest.raises(ConfigError, match=message):
            attempt("run")
    assert isinstance(package.load("run", trust=True), nn.Sequential)
    assert isinstance(package.load("run", f"{named}/net.py:net"), nn.Sequential)


def test_trained_models_need_no_data(named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(named)
    (named / "data.npz").rename(named / "gone.npz")
    try:
        assert package.load("run", trust=True)(torch.zeros(1, 20)).shape == (1, 3)
        assert package.predict("run", np.zeros((2, 20), np.float32), trust=True)["scores"].shape == (2, 3)
        assert lowmem_pnn("export run --exit 1 --trust --out there").code == 0
        with pytest.raises(ConfigError, match=r"^there is no file .*/data\.npz"):
            package.predict("run", trust=True)
    finally:
        (named / "gone.npz").rename(named / "data.npz")


# Export.


@pytest.mark.parametrize("to", ["safetensors", "pt2", "onnx"])
def test_a_tied_model_is_exported_in_each_format_and_compared(tied: Result, tmp_path: Path, to: Any) -> None:
    report = package.export(tied, to=to, out=tmp_path / "there")
    assert (report["file"], report["largest_difference"] < 1e-5) == (str(tmp_path / f"there/model.{to}"), True)
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["export.json", f"model.{to}"]
    model = tied.load(Tied())
    with torch.no_grad():
        expected = model(TOKENS)
    if to == "safetensors":
        saved, own = load_file(report["file"]), load_file(tied.weights_file)
        assert saved.keys() == own.keys()
        assert all(torch.equal(saved[name], own[name]) for name in own)
        return
    if to == "pt2":
        found = torch.export.load(report["file"]).module()(TOKENS)
    else:
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(report["file"])
        found = torch.from_numpy(session.run(None, {"x": TOKENS.numpy()})[0])
        assert session.run(None, {"x": TOKENS[:1].numpy()})[0].shape == (1, 6, 12)
    assert torch.allclose(found, expected, atol=1e-6)


def test_an_exit_is_exported_as_weights_of_its_layers_and_its_head(
    named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(named)
    done = lowmem_pnn(f"export run --to safetensors --exit 1 --out {tmp_path / 'there'} --trust --json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert (report["exit"], report["largest_difference"]) == (1, 0.0)
    saved, own, heads = (load_file(path) for path in (report["file"], "run/model.safetensors", "run/heads.safetensors"))
    assert set(saved) == {"0.weight", "0.bias", *heads}
    assert all(torch.equal(tensor, {**own, **heads}[name]) for name, tensor in saved.items())


def test_a_file_that_differs_replaces_nothing(tied: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> float:
        raise ConfigError("differs")

    monkeypatch.setattr("lowmem_pnn.exporting.export.largest_difference", fail)
    with pytest.raises(ConfigError, match=r"^differs$"):
        package.export(tied, to="pt2", out=tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_formats_that_need_the_whole_model_stay_within_the_budget(tied: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = importlib.import_module("lowmem_pnn.exporting.export_formats")
    for to, times in (("pt2", 2), ("onnx", 3)):
        with pytest.raises(BudgetError) as caught:
            formats.check_format(to, 60_000_000, 100_000_000)
        assert str(caught.value) == (
            f"--to {to} needs the model whole in memory, {times} times its 60.0 MB ({times * 60_000_000:,} bytes), above the run's budget of "
            "100.0 MB; give --to safetensors"
        )
        assert caught.value.enough_bytes == times * 60_000_000
        formats.check_format(to, 30_000_000, 100_000_000)
    formats.check_format("safetensors", 10**12, 1)
    with pytest.raises(ConfigError, match=r"^a file of ONNX holds at most 2 GiB, and the model has 3\.00 GB; give --to pt2$"):
        formats.check_format("onnx", 3 * 10**9, 10**11)
    with pytest.raises(BudgetError, match=r"^export without --to needs the model whole in memory, 2 times its 60\.0 MB"):
        formats.check_format(None, 60_000_000, 100_000_000)
    monkeypatch.setattr("lowmem_pnn.exporting.export.check_format", lambda to, weights, budget: _fail(to, weights, budget))
    # The tied matrix once: 96 + 64 + 8 values, and the buffer's 8.
    for name in ("pt2", None):
        with pytest.raises(ConfigError, match=rf"^{name} 704 100000000$"):
            package.export(tied, to=name)  # type: ignore[arg-type]


def _fail(*values: object) -> None:
    raise ConfigError(" ".join(map(str, values)))


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_package_that_is_missing_is_named_with_its_extra(tied: Result, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError) as caught:
        package.export(tied, to="onnx")
    assert str(caught.value) == f"--to onnx needs {missing}, which is not installed; run: pip install 'lowmem-pnn[onnx]'"


def test_what_cannot_be_compared_is_said(named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(named)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = lowmem_pnn(f"export run --to onnx --out {tmp_path / 'there'} --trust")
    assert (done.code, "largest_difference" in done.out) == (0, False), done.err
    assert done.err.endswith("not compared: onnxruntime is not installed; run: pip install 'lowmem-pnn[onnx]'\n")


class Two(nn.Module):
    """Takes two tensors, and returns a dictionary of two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        h = self.inner(left - right)
        return {"logits": h, "norm": h.norm(dim=1)}


def test_several_tensors_come_and_go_by_their_names(tmp_path: Path) -> None:
    x = {"left": torch.rand(8, 2), "right": torch.rand(8, 2)}
    result = package.fit(Two, (x, torch.arange(8) % 2), workdir=tmp_path / "run", **SMALL)
    with torch.no_grad():
        expected = result.load(Two())(**x)
    for to in ("pt2", "onnx"):
        report = package.export(result, to=to)  # type: ignore[arg-type]
        assert (report["inputs"], report["outputs"]) == (["left", "right"], ["logits", "norm"])
        assert report["largest_difference"] < 1e-5
    logits, norm = torch.export.load(tmp_path / "run/export/model.pt2").module()(*x.values())
    assert torch.allclose(logits, expected["logits"])
    assert torch.allclose(norm, expected["norm"])
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(tmp_path / "run/export/model.onnx"))
    found = session.run(["norm"], {name: tensor.numpy() for name, tensor in x.items()})
    assert torch.allclose(torch.from_numpy(found[0]), expected["norm"], atol=1e-6)
    assert package.export(result, to="safetensors")["largest_difference"] == 0.0


def test_a_forward_that_no_format_holds_is_one_line(tied: Result, named: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(named)
    assert (
        lowmem_pnn("export run --to onx --trust").fault
        == "--to 'onx' is none of safetensors, pt2, onnx, hf; did you mean 'onnx'?"
    )

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such operation")

    for name, to, form in (("torch.onnx.export", "onnx", "ONNX"), ("torch.export.export", "pt2", "a torch.export program")):
        monkeypatch.setattr(name, fail)
        with pytest.raises(ConfigError) as caught:
            package.export(tied, to=to)  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"the model of {tied.workdir} cannot be written as {form}: RuntimeError: no such operation; give --to safetensors"
        )
