"""What a user may get wrong about options, models and data: the command's exit code and its one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.commands import lowmem_pnn, train, write_data

pytestmark = pytest.mark.usefixtures("data_folder")


@pytest.mark.parametrize(
    ("more", "code", "text"),
    [
        ("--max-gpu-mem 1MB", 4, "above the budget of 1.0 MB; give --max-gpu-mem "),
        ("--max-gpu-mem 1B", 4, "above the budget of 1 B; give --max-gpu-mem "),
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
        (
            _MODULE.format(forward="y = self.a(x); return {'y': y, 'scores': self.b(y)}"),
            "of which no loss by name knows which to take",
        ),
        (_MODULE.format(forward="return self.a(x).detach()"), "no parameter of Net gets a gradient"),
        (_MODULE.format(forward="return self.b(self.a(x).mean(0, keepdim=True))"), "its first axis must be the batch"),
    ],
)
def test_a_factory_of_models_with_a_fault(code: str, text: str) -> None:
    Path("net.py").write_text(code)
    done = train("--json", model="net.py:build")
    assert (done.code, text in done.fault) == (3, True), done.fault
    assert not Path("run").exists()


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
        (
            {"x_train": _with(_X, np.nan)},
            "sample 17 of {}/bad.npz (training part) holds NaN; repair it or leave it out (--skip-broken)",
        ),
        ({"x_train": _with(_X, np.inf)}, "sample 17 of {}/bad.npz (training part) holds an infinite value"),
        ({"x_test": _with(_X, np.nan), "y_test": _Y}, "sample 17 of {}/bad.npz (test part) holds NaN"),
        ({"y_train": _with(_Y, -1)}, "y_train holds the label -1; number the classes from 0"),
        ({"y_train": _with(_Y, 7)}, "ends in 3 outputs, but the data set has 8 classes; write mlp:20-16-8"),
        (
            {"y_train": _with(_Y, np.nan)},
            "y_train: the target of sample 17 is NaN or infinite; repair it or leave the sample out",
        ),
        (
            {"y_train": _Y + 0.5},
            "gives outputs of shape (batch, 3), and data bad has 1 values to predict; it should give (batch, 1)",
        ),
        (
            {"y_train": np.eye(3)[_Y]},
            "labels have shape (120, 3), with one-hot rows; give one class number for each sample (one-hot: argmax)",
        ),
        (
            {"y_train": np.array(["a"] * 120)},
            "y_train: labels are words ('a'); give class numbers, the same for training and test: y = ",
        ),
        ({"y_train": _Y[:50]}, "120 samples but 50 labels"),
        ({"x_train": _X[:0], "y_train": _Y[:0]}, "is empty: it holds 0 samples; give at least 1"),
        ({"x_train": _X[:, :0]}, "samples of shape (0,) hold no values"),
        ({"x_train": None}, "lacks x_train"),
        ({"x_test": None}, "lacks x_test"),
        ({"x_test": _X[:, :5], "y_test": _Y}, "give both one shape and dtype"),
    ],
)
def test_data_with_a_fault(data_folder: Path, changes: dict[str, Any], text: str) -> None:
    write_data(data_folder / "bad.npz", **changes)
    done = train(data="npz:bad.npz")
    assert (done.code, text.format(data_folder) in done.fault) == (3, True), done.fault
    assert not Path("run", "result.json").exists()
    assert not Path("run", "model.safetensors").exists()


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_data_file_that_was_cut_short(data_folder: Path, size: int) -> None:
    (data_folder / "bad.npz").write_bytes((data_folder / "data.npz").read_bytes()[:size])
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
        (_SET.format(fault="x = torch.rand(20)"), "are drawn at random whenever they are read, and activations of them are kept"),
    ],
)
def test_a_factory_of_data_with_a_fault(code: str, text: str) -> None:
    Path("set.py").write_text(code)
    done = train(data="set.py:build")
    assert (done.code, text in done.fault) == (3, True), done.fault
    assert not Path("run", "result.json").exists()


def test_debug_shows_the_traceback() -> None:
    done = train("--debug --cuts 99")
    assert done.code == 3
    assert "\nTraceback" in done.err
    assert done.err.splitlines()[-1].startswith("lowmem-pnn: no layer 99")


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
    assert "failed on 2 of its samples: IndexError: no such row; mend its forward" in done.fault
    assert "IndexError: no such row" in done.fault
