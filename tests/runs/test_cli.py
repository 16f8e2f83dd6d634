"""The command line: what it prints, how it fails, and with which exit code. In this process, without a supervisor.

python tests/test_cli.py  # writes tests/golden/*.txt anew
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import Outcome, lowmem_pnn, write_data
from lowmem_pnn.stores import run_directory

GOLDEN = Path(__file__).parents[1] / "unit" / "cli" / "golden"
COMMANDS = ["", "fit", "plan", "evaluate"]
FIT = "fit --max-gpu-mem 100MB --device cpu --epochs 1 "


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_directory, "_LOCK_PATIENCE_SECONDS", 0.2)
    write_data(tmp_path / "data.npz")
    return tmp_path


def train(more: str = "", model: str = "mlp:20-16-3", data: str = "npz:data.npz", workdir: str = "run") -> Outcome:
    return lowmem_pnn(f"{FIT} --model '{model}' --data '{data}' --workdir '{workdir}' {more}")


# Help and usage.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_it_was_last_read(command: str) -> None:
    shown = lowmem_pnn(f"{command} --help")
    assert shown.code == 0
    assert shown.out == (GOLDEN / f"help-{command or 'all'}.txt").read_text(), "if it is meant: python tests/test_cli.py"


def test_version() -> None:
    assert lowmem_pnn("--version").out.startswith("lowmem-pnn, version ")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("fitt", "no such command 'fitt'; Did you mean 'fit'?; lowmem-pnn --help lists what there is"),
        ("fit --max-gpu-mem", "option '--max-gpu-mem' requires an argument; lowmem-pnn"),
        ("fit --optimiser adam", "no such option '--optimiser'"),
        ("fit again", "got unexpected extra argument (again); lowmem-pnn fit --help lists what there is"),
        ("evaluate", "missing argument 'RUN'; lowmem-pnn evaluate --help lists what there is"),
    ],
)
def test_usage_is_code_2_on_one_line(line: str, text: str) -> None:
    done = lowmem_pnn(line)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert done.fault.startswith(text)


# What a user may get wrong: (arguments, exit code, text).


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("fit", 2, "--max-gpu-mem is missing; give --max-gpu-mem 2GB"),
        ("fit --max-gpu-mem '512 megs'", 3, "--max-gpu-mem: '512 megs' is not a size; write 512MB or 512MiB"),
        ("fit --max-gpu-mem -5MB", 3, "'-5MB' is not a size"),
        ("fit --max-gpu-mem 0", 3, "'0' is a size of 0 bytes; write a positive one"),
        ("fit --max-gpu-mem 1GB --model mlp:64-10", 3, "--data is missing; give --data digits"),
        (
            "fit --max-gpu-mem 1GB --method pnm",
            3,
            "--method 'pnm' is none of pnn, neuroflux, exact, backprop; did you mean 'pnn'?",
        ),
        ("fit --max-gpu-mem 1GB --seed -1", 3, "--seed '-1': must be greater than or equal to 0"),
        ("fit --resume", 3, "--resume needs the run to go on with; give --workdir DIR"),
        (
            "fit --resume --workdir no-run",
            6,
            "no-run holds no run to resume or evaluate; give the folder of one, or leave --resume out to begin",
        ),
        (
            "fit --resume --workdir run --epochs 3 --overwrite",
            3,
            "--epochs, --overwrite with --resume would change the run, which goes on with the configuration in --workdir; "
            "leave them out",
        ),
        ("evaluate no-run", 6, "no-run holds no run"),
        ("fit --max-gpu-mem 1GB --optimizer sgdd", 3, "--optimizer 'sgdd' is none of sgd, adam, adamw; did you mean 'sgd'?"),
        ("fit --max-gpu-mem 1GB --shuffle maybe", 3, "--shuffle 'maybe' is none of yes, no"),
        ("fit --max-gpu-mem 1GB --sil gaussian", 3, "--sil 'gaussian' is none of uniform, normal, orthogonal, sparse"),
        (
            "fit --max-gpu-mem 1GB --method exact --kappa 1 --sil normal --sil-target full --parallel-sil",
            3,
            "--kappa has no effect here: it needs --method pnn; --sil has no effect here: it needs --method pnn; "
            "--sil-target has no effect here: it needs --method pnn; --parallel-sil has no effect here: it needs --method pnn",
        ),
        (
            "fit --max-gpu-mem 1GB --parallel-sil --sil-target pooled",
            3,
            "--parallel-sil needs labels that a partition can take as inputs, and --sil-target pooled has none; leave one out",
        ),
        (
            "fit --max-gpu-mem 1GB --method exact --shuffle yes,no",
            3,
            "--method exact trains all partitions together; give one value",
        ),
        ("plan --max-gpu-mem 1GB --cuts ''", 3, "--cuts '': there is nothing between two commas"),
    ],
)
def test_bad_options(line: str, code: int, text: str) -> None:
    done = lowmem_pnn(line)
    assert (done.code, text in done.fault) == (code, True), done.fault
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        ("--max-gpu-mem 1MB", 4, "above the budget of 1.0 MB; give --max-gpu-mem "),
        ("--max-gpu-mem 1", 4, "above the budget of 1 B; give --max-gpu-mem "),
        ("--max-gpu-mem 900TB", 4, "--max-gpu-mem 900.00 TB is more than this machine has"),
        ("--max-disk 1kB", 5, "on disk, above --max-disk 1.0 kB; give more"),
        ("--cuts nonsense", 3, "no layer 'nonsense' in the model; the layers are 0, 1"),
        ("--cuts 0", 3, "--cuts at layers 0: the cuts of a model of 2 layers must be ascending and between 1 and 1"),
        ("--cuts 1,1", 3, "must be ascending"),
        ("--cuts 99", 3, "no layer 99: the layers are numbered from 0 ('0') to 1 ('1')"),
        ("--partitions 9", 3, "this model of 2 layers can be cut into at most 2 partitions"),
        ("--epochs 1,2,3 --partitions 2", 3, "--epochs has 3 values, and there are 2 partitions; give one value or 2"),
        ("--epochs 1,2,3", 3, "--epochs has 3 values, and there is 1 partition; give one value, or set --cuts or --partitions"),
        ("--optimizer sgd,adam,sgd --cuts 1", 3, "--optimizer has 3 values, and there are 2 partitions; give one value or 2"),
        ("--shuffle no,yes,no --cuts 1", 3, "--shuffle has 3 values, and there are 2 partitions; give one value or 2"),
        ("--kappa 1,2 --cuts 1", 3, "--kappa has 2 values, and there is 1 boundary; give one value"),
        ("--micro-batch 100", 3, "--micro-batch 100 is above --batch-size 64; give at most 64, or a larger --batch-size"),
        ("--val-fraction 0.999", 3, "leaves none to train on; use more samples or fraction 0"),
        ("--train-limit 1", 3, "a validation fraction of 0.1 of 1 samples leaves none to train on"),
        (
            "--model-arg width=3",
            3,
            "--model-arg has no effect here: it needs a model that is built by a factory (not mlp: or gpt:)",
        ),
        ("--model-arg width", 3, "model argument 'width' is not NAME=VALUE; write, for example, --model-arg width=64"),
        ("--lr 1e30 --optimizer sgd", 7, "the loss became"),
    ],
)
def test_options_that_this_model_cannot_have(more: str, code: int, text: str) -> None:
    done = train(more)
    assert (done.code, text in done.fault) == (code, True), done.fault
    assert not Path("run", "result.json").exists()
    assert not Path("run", "model.safetensors").exists()


@pytest.mark.parametrize("more", ["--budget-scope allocator", "--max-host-mem 1GB"])
def test_options_for_a_gpu_on_a_machine_without(more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = lowmem_pnn(f"fit --max-gpu-mem 100MB --model mlp:20-3 --data npz:data.npz {more}")
    assert done.code == 3
    assert "has no effect here: it needs a CUDA device" in done.fault


@pytest.mark.parametrize(
    ("more", "samples", "micro_batch"),
    [
        ("--train-limit 1 --val-fraction 0", 1, 64),
        ("--train-limit 2", 1, 64),
        ("--batch-size 100000", 108, 100000),
        ("--batch-size 1", 108, 1),
        ("--test-limit 999999 --val-fraction 0", 120, 64),
        ("--seed 9223372036854775807", 108, 64),
        ("--fused --no-fused", 108, 64),
        ("--cuts 1 --optimizer sgd,adam --momentum 0.5 --shuffle no,YES --sil sparse --parallel-sil", 108, 64),
        ("--partitions 1 --parallel-sil --val-fraction 0", 120, 64),
        ("--keep-commits 3 --commit-every 0 --partitions 2", 108, 64),
    ],
)
def test_extremes_that_are_right(more: str, samples: int, micro_batch: int) -> None:
    done = train(more + " --json --quiet")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["partitions"][0]["micro_batch"] == micro_batch
    assert result["macs"] >= samples * (20 * 16 + 16 * 3)
    assert len(load_file("run/model.safetensors")) == 4


# Models.


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("mlp", "'mlp' is not an mlp; write two or more positive widths, input first and classes last: mlp:784-80-47"),
        ("mlp:20-0-3", "'mlp:20-0-3' is not an mlp"),
        ("mlp:32-16-3", "model mlp:32-16-3 takes 32 values, and the samples of data data have 20; write mlp:20-16-3"),
        ("mlp:20-16-2", "ends in 2 outputs, but the data set has 3 classes; write mlp:20-16-3"),
        ("mlp:20-99999999999999999-3", "a layer of 20 x 99999999999999999 values is more than a tensor can hold"),
        ("resnet19", "there is no model 'resnet19'; did you mean 'resnet18'"),
        ("net.py", "names a file but no function in it; write net.py:FACTORY"),
        ("net.py:build", "there is no file "),
        ("nosuch:build", "importing nosuch failed with ModuleNotFoundError: No module named 'nosuch'"),
        ("python:mine", "this run was started from Python with its own model"),
    ],
)
def test_no_such_model(model: str, text: str) -> None:
    done = train(model=model)
    assert (done.code, text in done.fault) == (3, True), done.fault
    assert not Path("run").exists()


_MODULE = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(20, 3), torch.nn.Linear(3, 3)
    def forward(self, x):
        {forward}
def build():
    return Net()
"""
_FACTORY = "import torch\ndef build():\n    {body}\n"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("def build(:\n", "failed with SyntaxError: invalid syntax (net.py, line 1)"),
        ("import nosuch\n", "failed with ModuleNotFoundError: No module named 'nosuch'"),
        ("import sys\nsys.exit(3)\n", "failed with SystemExit: 3"),
        ("def built(): pass\n", "defines no 'build'; did you mean 'built'?"),
        ("build = 3\n", "build has type int, it is not a function"),
        (_FACTORY.format(body="raise ValueError('no\\nway')"), "cannot be built with no arguments: ValueError: no;"),
        (_FACTORY.format(body="raise RuntimeError('boom')"), "cannot be built: RuntimeError: boom; see to its constructor"),
        (_FACTORY.format(body="open('/nowhere/x')"), "cannot be built: FileNotFoundError: [Errno 2] No such file"),
        (_FACTORY.format(body="raise SystemExit(3)"), "ended the process with SystemExit: 3; let it return or raise"),
        (_FACTORY.format(body="return None"), "build() returned a value of type NoneType; it must return a torch.nn.Module"),
        (_FACTORY.format(body="return torch.nn.Linear"), "returned a value of type type"),
        ("def build(width): pass\n", "needs the argument 'width'; give --model-arg width=VALUE"),
        (
            _FACTORY.format(body="return torch.nn.Linear(20, 2)"),
            "and data data has 3 classes; it should give (batch, 3), or more scores than that",
        ),
        (_FACTORY.format(body="return torch.nn.Linear(32, 3)"), "does not run on samples of (20,) float32"),
        (_FACTORY.format(body="return torch.nn.Linear(20, 3).double()"), "has float64 weights, and samples are float32"),
        (_FACTORY.format(body="return torch.nn.ReLU()"), "has no parameters to train"),
        (_FACTORY.format(body="return torch.nn.Linear(20, 3).requires_grad_(False)"), "has no parameters to train"),
        (_FACTORY.format(body="return torch.nn.LazyLinear(3)"), "has no shape yet; run the model once on one sample"),
        (_MODULE.format(forward="return {'scores': self.b(self.a(x))}"), "returns dict of 1, not one tensor"),
        (
            _MODULE.format(forward="return self.a(x) if x.sum() > 0 else self.b(x)"),
            "cannot be cut into layers: its forward cannot be",
        ),
        (_MODULE.format(forward="return self.a(x)"), "parameter 'b.weight' of Net gets no gradient"),
        (_MODULE.format(forward="return self.b(self.a(x).mean(0, keepdim=True))"), "its first axis must be the batch"),
    ],
)
def test_a_factory_of_models_with_a_fault(code: str, text: str) -> None:
    Path("net.py").write_text(code)
    done = train("--json", model="net.py:build")
    assert (done.code, text in done.fault) == (3, True), done.fault
    assert not Path("run").exists()


def test_what_a_factory_prints_is_not_the_result() -> None:
    Path("net.py").write_text("print('imported')\n" + _FACTORY.format(body="print('built'); return torch.nn.Linear(20, 3)"))
    done = train("--json", model="net.py:build")
    assert done.code == 0
    assert json.loads(done.out)["method"] == "pnn"
    assert {"imported", "built"} <= set(done.err.splitlines())


def test_a_parameter_that_no_gradient_reaches_is_an_error() -> None:
    Path("net.py").write_text(_MODULE.format(forward="return self.a(x) + 0 * self.b(self.a(x)).detach()"))
    done = train(model="net.py:build")
    assert done.code == 3
    assert "parameter 'b.weight'" in done.fault
    assert "gradient" in done.fault
    assert not Path("run", "result.json").exists()


# Data.


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("digitz", "there is no data set 'digitz'; did you mean 'digits'?"),
        ("npz:", "data set 'npz:' says no place"),
        ("npz:none.npz", "there is no file "),
        ("npz:~nobody-of-that-name/x.npz", "there is no file "),
        ("data.npz", "data set 'data.npz' is a file; write npz:data.npz"),
        ("npz:/dev/null", "there is no file /dev/null"),
        ("imagefolder:none", "there is no folder "),
        ("imagefolder:.", "holds no folders; put the images of each class in a folder of its own"),
    ],
)
def test_no_such_data(data: str, text: str) -> None:
    done = train(data=data)
    assert (done.code, text in done.fault) == (3, True), done.fault
    assert not Path("run").exists()


_X, _Y = np.zeros((120, 20), np.float32), np.arange(120) % 3


def _with(array: np.ndarray, value: float) -> np.ndarray:
    changed = array.astype(np.float64) if isinstance(value, float) else array.copy()
    changed[17] = value
    return changed


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"x_train": _with(_X, np.nan)}, "sample 17 of {}/bad.npz (training part) holds NaN; repair it or leave it out"),
        ({"x_train": _with(_X, np.inf)}, "sample 17 of {}/bad.npz (training part) holds an infinite value"),
        ({"x_test": _with(_X, np.nan), "y_test": _Y}, "sample 17 of {}/bad.npz (test part) holds NaN"),
        ({"y_train": _with(_Y, -1)}, "y_train holds the label -1; number the classes from 0"),
        ({"y_train": _with(_Y, 7)}, "ends in 3 outputs, but the data set has 8 classes; write mlp:20-16-8"),
        ({"y_train": _with(_Y, np.nan)}, "y_train: a label is nan; labels are class numbers"),
        ({"y_train": _Y + 0.5}, "y_train: a label is 0.5; labels are class numbers"),
        ({"y_train": np.eye(3)[_Y]}, "labels have shape (120, 3); give one class number for each sample (one-hot: argmax)"),
        ({"y_train": np.array(["a"] * 120)}, "holds values of dtype <U1; give real numbers"),
        ({"y_train": _Y[:50]}, "120 samples but 50 labels"),
        ({"x_train": _X[:0], "y_train": _Y[:0]}, "is empty: it holds 0 samples; give at least 1"),
        ({"x_train": _X[:, :0]}, "samples of shape (0,) hold no values"),
        ({"x_train": None}, "lacks x_train"),
        ({"x_test": None}, "lacks x_test"),
        ({"x_test": _X[:, :5], "y_test": _Y}, "give both one shape and dtype"),
    ],
)
def test_data_with_a_fault(folder: Path, changes: dict[str, Any], text: str) -> None:
    write_data(folder / "bad.npz", **changes)
    done = train(data="npz:bad.npz")
    assert (done.code, text.format(folder) in done.fault) == (3, True), done.fault
    assert not Path("run", "result.json").exists()
    assert not Path("run", "model.safetensors").exists()


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_data_file_that_was_cut_short(folder: Path, size: int) -> None:
    (folder / "bad.npz").write_bytes((folder / "data.npz").read_bytes()[:size])
    done = train(data="npz:bad.npz")
    assert done.code == 3
    assert "cannot be read as .npz" in done.fault


_SET = """
import torch
class Set:
    classes = ["a", "b"]
    def __len__(self):
        return 50
    def __getitem__(self, number):
        x = torch.rand(20, generator=torch.Generator().manual_seed(number))
        {fault}
        return x, number % 2
def build():
    return Set()
"""


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("def build(): raise RuntimeError('boom')", "cannot be opened: RuntimeError: boom; see to the function"),
        ("def build(root): pass", "cannot be opened: TypeError: build() missing 1 required positional argument: 'root'"),
        ("def build(): return []", "is empty: it holds 0 samples"),
        ("def build(): return None", "build() returned no data"),
        ("def build(): return iter([])", "without __getitem__ and __len__; give a map-style data set"),
        (_SET.format(fault="x[3] = float('nan') if number == 33 else 0"), "sample 33 of set-build (training part) holds NaN"),
        (_SET.format(fault="if number == 33: return x, 2"), "has label 2, outside 0 to 1 (2 classes); number the classes from 0"),
        (_SET.format(fault="if number == 33: return x[:5], 0"), "give all samples one shape and dtype"),
        (
            _SET.format(fault="if number == 33: open('/nowhere')"),
            "sample 33 of set-build (training part) cannot be read: FileNotFound",
        ),
        (_SET.format(fault="x = torch.rand(20)"), "differs when it is read again; take random transforms out"),
    ],
)
def test_a_factory_of_data_with_a_fault(code: str, text: str) -> None:
    Path("set.py").write_text(code)
    done = train(data="set.py:build")
    assert (done.code, text in done.fault) == (3, True), done.fault
    assert not Path("run", "result.json").exists()


# Where it is written.


def test_a_workdir_with_spaces_and_letters() -> None:
    done = train("--json", workdir="a b/ü ñ/run 1")
    assert done.code == 0
    assert json.loads(done.out)["weights_file"] == "a b/ü ñ/run 1/model.safetensors"
    assert lowmem_pnn("evaluate", "a b/ü ñ/run 1").code == 0


def test_a_workdir_is_chosen_if_none_is_given() -> None:
    for number in (1, 2):
        assert lowmem_pnn(f"{FIT} --model mlp:20-16-3 --data npz:data.npz").code == 0
        assert Path("runs", f"mlp-20-16-3-pnn-{number}", "model.safetensors").exists()


def test_a_workdir_that_is_not_free() -> None:
    assert train().code == 0
    before = Path("run", "model.safetensors").stat().st_mtime_ns
    done = train()
    assert done.code == 3
    assert done.fault == "--workdir run holds a run already; give --resume to go on with it, or --overwrite to replace it"
    assert Path("run", "model.safetensors").stat().st_mtime_ns == before
    assert train("--overwrite --seed 1").code == 0
    assert Path("run", "model.safetensors").stat().st_mtime_ns != before
    assert train(workdir=".").fault == "--workdir . is not empty and holds no run; give another folder"


def test_a_workdir_that_is_empty_is_taken_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("empty")
    assert train(workdir="link").code == 0
    (folder / "here").mkdir()
    monkeypatch.chdir("here")
    assert train(data="npz:../data.npz", workdir=".").code == 0
    assert Path.cwd().name == "here"
    assert Path("model.safetensors").exists()


def test_a_workdir_in_use() -> None:
    assert train().code == 0
    with run_directory.RunDirectory.open(Path("run")):
        done = train("--overwrite")
        assert done.code == 8
        assert done.fault == f"--workdir run is in use by process {os.getpid()}; wait for it, or choose another folder"
        assert lowmem_pnn("fit --resume --workdir run").code == 8
        assert lowmem_pnn("evaluate run").code == 8


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 100 kB."""
    place = folder / "disk"
    place.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can be mounted only by root")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(small_disk: Path) -> None:
    line = f"{FIT} --model mlp:20-60-60-3 --cuts 1 --epochs 2 --data npz:data.npz --workdir"
    done = lowmem_pnn(f"{line} disk/run")
    assert done.code == 5
    assert "no space left on device" in done.fault
    assert done.fault.endswith("make room there, or give a --workdir on another disk")
    assert not (small_disk / "run" / "result.json").exists()
    assert not (small_disk / "run" / "model.safetensors").exists()
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    assert lowmem_pnn("fit --resume --workdir disk/run").code == 0
    assert lowmem_pnn(f"{line} whole").code == 0
    assert Path("whole/model.safetensors").read_bytes() == (small_disk / "run" / "model.safetensors").read_bytes()


def test_a_disk_that_cannot_be_written_to(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert (
        train(workdir="disk/run").fault
        == "cannot make --workdir disk/run: read-only file system; choose a folder that can be written"
    )
    done = train(workdir="disk")
    assert (done.code, "read-only file system" in done.fault) == (5, True)


# Results, and going on.


def test_json_is_alone_on_stdout_and_is_the_result_file() -> None:
    done = train("--json")
    assert done.code == 0
    assert done.err == "building mlp:20-16-3\n"
    assert json.loads(done.out) == json.loads(Path("run/result.json").read_text())
    quiet = train("--json --quiet --overwrite")
    assert quiet.err == ""
    shown = train("--overwrite")
    assert shown.out.splitlines()[-1].startswith("model ")


def test_a_plan_writes_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    done = lowmem_pnn("plan --max-gpu-mem 100MB --model mlp:20-16-3 --data npz:data.npz --partitions 2 --json")
    assert done.code == 0
    assert len(json.loads(done.out)["partitions"]) == 2
    assert sorted(folder.iterdir()) == before


def test_a_plan_shows_all_methods_side_by_side() -> None:
    line = "plan --max-gpu-mem 100MB --device cpu --model mlp:20-16-3 --data npz:data.npz --method exact"
    shown = lowmem_pnn(line)
    assert shown.code == 0
    heads = next(row for row in shown.out.splitlines() if "seconds per epoch" in row)
    assert heads.split("  ")[1].strip() == "method"
    rows = [row.split() for row in shown.out.splitlines() if " fits " in row]
    assert [row[:2] if row[0] == ">" else row[:1] for row in rows] == [["pnn"], ["neuroflux"], [">", "exact"], ["backprop"]]
    prospects = json.loads(lowmem_pnn(f"{line} --json").out)["prospects"]
    assert [one["asked"] for one in prospects] == [False, False, True, False]
    assert all(one["fits"] and one["seconds_per_epoch"] > 0 and one["micro_batches"] for one in prospects)
    without = lowmem_pnn(f"{line} --json --no-timing")
    assert json.loads(without.out)["prospects"] == []


def test_a_plan_says_which_methods_cannot(folder: Path) -> None:
    (folder / "text").write_bytes(bytes(range(256)) * 40)
    line = (
        "plan --max-gpu-mem 100MB --device cpu --model gpt:layers=1,width=16,heads=2,context=16 --data text:text --method exact"
    )
    reasons = {one["method"]: one["reason"] for one in json.loads(lowmem_pnn(f"{line} --json").out)["prospects"]}
    assert "needs a class for each sample" in reasons["pnn"]
    assert not any(reasons[method] for method in ("exact", "backprop", "neuroflux"))


def test_evaluate_gives_the_scores_of_the_run() -> None:
    result = json.loads(train("--json").out)
    done = lowmem_pnn("evaluate run --json")
    assert done.code == 0
    scores = json.loads(done.out)
    assert scores["test_accuracy"] == result["test_accuracy"]
    assert scores["test_loss"] == pytest.approx(result["test_loss"])


def test_evaluate_on_other_data_than_the_run_had() -> None:
    assert train().code == 0
    write_data(Path("data.npz"), x_test=_X, y_test=_Y)
    done = lowmem_pnn("evaluate run")
    assert done.code == 6
    assert "is not what the run in run began with" in done.fault


def test_a_terminal_without_the_letters_gets_the_result() -> None:
    # A process of its own costs seconds: one in which the work is done, and only the page is printed.
    code = "import sys; from lowmem_pnn import cli; cli.plan.callback = lambda **_: cli.click.echo('\u2500 layer \u00fc'); cli.main()"
    command = [sys.executable, "-c", code, "plan"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True, check=True)
    assert done.stdout == b"? layer \xfc\n"


def test_a_finished_run_is_resumed_to_its_result_without_its_data() -> None:
    first = train("--json")
    Path("data.npz").unlink()
    again = lowmem_pnn("fit --resume --workdir run --json")
    assert again.code == 0
    assert again.out == first.out


_STOPPER = """
import os, signal
from pathlib import Path
import numpy as np
class Set:
    classes = ["a", "b", "c"]
    reads = 0
    def __init__(self):
        with np.load({data!r}) as file:
            self.x, self.y = file["x_train"], file["y_train"]
    def __len__(self):
        return len(self.x)
    def __getitem__(self, number):
        Set.reads += 1
        if Set.reads == 700 and not Path({marker!r}).exists():
            Path({marker!r}).touch()
            os.kill(os.getpid(), signal.{signal})
        return self.x[number], int(self.y[number])
def build():
    return Set()
"""


@pytest.fixture
def stopped(folder: Path) -> Path:
    """A run that was stopped in an epoch."""
    marker = str(folder / "stopped")
    (folder / "set.py").write_text(_STOPPER.format(data=str(folder / "data.npz"), marker=marker, signal="SIGTERM"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done = train("--epochs 9,3 --cuts 1 --batch-size 16", data="set.py:build")
    assert done.code == 75, done.err
    assert done.fault == "stopped; lowmem-pnn fit --resume --workdir run goes on from the last commit"
    assert "stopping after this batch; once more to stop at once" not in done.out
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not Path("run/result.json").exists()
    return folder / "run"


def test_a_stopped_run_goes_on_to_the_same_bits_from_any_folder(
    stopped: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    done = lowmem_pnn("fit", "--resume", "--workdir", stopped, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["resumed"] == 1
    monkeypatch.chdir(folder)
    assert train("--epochs 9,3 --cuts 1 --batch-size 16", data="set.py:build", workdir="whole").code == 0
    assert (stopped / "model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    lines = [len((run / "metrics.jsonl").read_text().splitlines()) for run in (stopped, Path("whole"))]
    assert lines[0] == lines[1]


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda run: _flip(sorted((run / "weights").iterdir())[0]), "has sha256"),
        (lambda run: sorted((run / "weights").iterdir())[0].unlink(), "weights/"),
        (lambda run: shutil.rmtree(run / "weights"), "weights/"),
        (lambda run: os.truncate(sorted((run / "weights").iterdir())[0], 3000), "weights/"),
        (lambda run: _flip(run / "journal.json"), "journal.json is"),
        (lambda run: (run / "journal.json").write_text(""), "journal.json is no journal"),
        (
            lambda run: (run / "config.json").write_text((run / "config.json").read_text().replace("16", "17")),
            "config.json is not",
        ),
        (lambda run: (run / "config.json").unlink(), "config.json: no such file"),
        (lambda run: write_data(run.parent / "data.npz", x_train=_X + 1), "is not what the run in run began with"),
    ],
)
def test_a_damaged_or_changed_run_is_not_gone_on_with(stopped: Path, damage: Any, text: str) -> None:
    damage(stopped)
    done = lowmem_pnn("fit --resume --workdir run")
    assert (done.code, text in done.fault) == (6, True), done.fault
    assert not Path("run/result.json").exists()


@pytest.mark.parametrize("name", ["result.json", "model.safetensors"])
def test_a_finished_run_without_its_files(name: str) -> None:
    assert train().code == 0
    Path("run", name).unlink()
    done = lowmem_pnn("fit --resume --workdir run")
    assert (done.code, f"run/{name}" in done.fault) == (6, True), done.fault


def test_debug_shows_the_traceback() -> None:
    done = train("--debug --cuts 99")
    assert done.code == 3
    assert done.err.startswith("Traceback")
    assert done.err.splitlines()[-1].startswith("lowmem-pnn: no layer 99")


def test_a_fault_of_ours_is_code_1_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("two\nlines")

    monkeypatch.setattr("lowmem_pnn.api.plan_run", fail)
    done = lowmem_pnn("plan --max-gpu-mem 100MB")
    assert done.code == 1
    assert done.fault == "a fault of its own: AssertionError: two lines; run again with --debug for the traceback"


def test_memory_that_ends_outside_of_training_is_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lowmem_pnn.api.plan_run", fail)
    done = lowmem_pnn("plan --max-gpu-mem 100MB")
    assert done.code == 4
    assert done.fault.startswith("out of memory outside of training (MemoryError:); give a larger --max-gpu-mem")


def write_golden() -> None:
    """Write the help texts as they are now."""
    GOLDEN.mkdir(exist_ok=True)
    for command in COMMANDS:
        (GOLDEN / f"help-{command or 'all'}.txt").write_text(lowmem_pnn(f"{command} --help").out)


if __name__ == "__main__":
    write_golden()


def test_a_plan_that_does_not_fit_is_shown_and_has_the_code_of_the_failure() -> None:
    done = lowmem_pnn("plan --max-gpu-mem 20MB --model mlp:64-4096-4096-10 --data digits --device cpu")
    assert done.code == 4
    assert "does not fit: layer '1' alone needs" in done.out
    assert lowmem_pnn("plan --max-gpu-mem 2GB --max-disk 100kB --model mlp:64-256-10 --data digits --device cpu").code == 5


def test_a_model_that_fails_on_real_tensors_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Picky(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        if x.device.type != 'meta' and not isinstance(x, torch._subclasses.FakeTensor):\n"
        "            raise IndexError('no such row')\n"
        "        return x\n"
        "def build():\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), Picky(), torch.nn.Linear(16, 10))\n"
    )
    done = lowmem_pnn(
        f"fit --max-gpu-mem 100MB --model {tmp_path}/net.py:build --data digits --device cpu --workdir {tmp_path}/run"
    )
    assert done.code == 3
    assert "the model failed on a batch of zeros" in done.fault
    assert "IndexError: no such row" in done.fault
