"""The command line in this process, without a supervisor: run directories, results, plans, evaluation, stops and resumption."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from helpers.commands import FIT, check_keys, lowmem_pnn, train, write_data
from lowmem_pnn.stores import run_directory

pytestmark = pytest.mark.usefixtures("data_folder")


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


def test_what_a_factory_prints_is_not_the_result() -> None:
    Path("net.py").write_text(
        "print('imported')\nimport torch\ndef build():\n    print('built'); return torch.nn.Linear(20, 3)\n"
    )
    done = train("--json", model="net.py:build")
    assert done.code == 0
    assert json.loads(done.out)["method"] == "pnn"
    assert {"imported", "built"} <= set(done.err.splitlines())


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


def test_a_workdir_that_is_empty_is_taken_as_it_is(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (data_folder / "empty").mkdir()
    (data_folder / "link").symlink_to("empty")
    assert train(workdir="link").code == 0
    (data_folder / "here").mkdir()
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


# Results, and going on.


def test_json_is_alone_on_stdout_and_is_the_result_file() -> None:
    done = train("--json")
    assert done.code == 0
    assert [line.split()[0] for line in done.err.splitlines()] == [
        "opening", "data:", "samples:", "planning", "building", "comparing", "checking", "model:", "plan:", "budget:",
        *["partition"], "measuring",
    ]  # fmt: skip
    result = json.loads(done.out)
    assert result == json.loads(Path("run/result.json").read_text())
    check_keys(result)
    assert (result["exits"], result["chosen_exit"]) == ([], None)
    assert {"lowmem-pnn", "torch", "python"} <= set(result["versions"])
    quiet = train("--json --quiet --overwrite")
    assert quiet.err == ""
    shown = train("--overwrite")
    assert [line.split()[0] for line in shown.out.splitlines()[-6:]] == ["needs", "budget", "peak", "time", "score", "next"]


def test_a_plan_writes_nothing(data_folder: Path) -> None:
    before = sorted(data_folder.iterdir())
    done = lowmem_pnn("plan --max-gpu-mem 100MB --model mlp:20-16-3 --data npz:data.npz --partitions 2 --json")
    assert done.code == 0
    assert len(json.loads(done.out)["partitions"]) == 2
    assert sorted(data_folder.iterdir()) == before


def test_a_run_is_repeated_by_its_own_file() -> None:
    assert train("--seed 3 --lr 0.01").code == 0
    again = lowmem_pnn("fit --config run/config.toml --workdir again --json")
    assert again.code == 0, again.err
    assert Path("again/model.safetensors").read_bytes() == Path("run/model.safetensors").read_bytes()
    assert Path("again/config.toml").read_text() == Path("run/config.toml").read_text()


def test_a_share_is_resolved_once_and_kept_by_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "fit --device cpu --model mlp:20-16-3 --data npz:data.npz --epochs 1 --workdir run --json --quiet --max-gpu-mem"
    monkeypatch.setattr("lowmem_pnn.memory.available.bytes_for_budget", lambda device: 400_000_000)
    assert json.loads(lowmem_pnn(f"{line} 25%").out)["budget_bytes"] == 100_000_000
    monkeypatch.setattr("lowmem_pnn.memory.available.bytes_for_budget", lambda device: 300_000_000)
    assert json.loads(lowmem_pnn(f"{line} auto --resume").out)["budget_bytes"] == 100_000_000


def test_plans_in_several_budgets_side_by_side() -> None:
    line = "plan --budgets 10M,100M,50000TB --device cpu --model mlp:20-600-600-600-600-3 --data npz:data.npz --no-timing --method backprop"
    reports = json.loads(lowmem_pnn(f"{line} --json").out)["budgets"]
    fits = [(10_000_000, False), (100_000_000, True), (50_000 * 10**12, False)]
    assert [(report["budget_bytes"], report["fits"]) for report in reports] == fits
    assert "is more than this machine has" in reports[2]["reason"]
    assert reports[2]["exit_code"] == 4
    shown = lowmem_pnn(line)
    assert shown.code == 0, "one of them fits"
    assert "100.0 MB: fits" in shown.out


def test_a_plan_shows_all_methods_side_by_side() -> None:
    line = "plan --max-gpu-mem 100MB --device cpu --model mlp:20-16-3 --data npz:data.npz --method exact"
    shown = lowmem_pnn(line)
    assert shown.code == 0
    heads = next(row for row in shown.out.splitlines() if "seconds per epoch" in row)
    assert heads.split("  ")[1].strip() == "method"
    rows = [row.split() for row in shown.out.splitlines() if " fits " in row and not row.startswith("take ")]
    assert "\ntake " in shown.out
    assert [row[:2] if row[0] == ">" else row[:1] for row in rows] == [
        ["pnn"],
        ["neuroflux"],
        ["incubate"],
        [">", "exact"],
        ["backprop"],
    ]
    prospects = json.loads(lowmem_pnn(f"{line} --json").out)["prospects"]
    assert [one["asked"] for one in prospects] == [False, False, False, True, False]
    assert all(one["fits"] and one["seconds_per_epoch"] > 0 and one["micro_batches"] for one in prospects)
    without = lowmem_pnn(f"{line} --json --no-timing")
    assert json.loads(without.out)["prospects"] == []


def test_a_plan_says_which_methods_cannot(data_folder: Path) -> None:
    (data_folder / "text").write_bytes(bytes(range(256)) * 40)
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
    shown = lowmem_pnn("evaluate run")
    assert shown.code == 0, shown.err
    assert f"test_accuracy {scores['test_accuracy']:.4f}, " in shown.out


def test_evaluate_on_other_data_than_the_run_had() -> None:
    assert train().code == 0
    write_data(Path("data.npz"), x_test=np.zeros((120, 20), np.float32), y_test=np.arange(120) % 3)
    done = lowmem_pnn("evaluate run")
    assert done.code == 6
    assert (
        "is not what the run in run began with (samples then train=108 val=12 test=30, now train=108 val=12 test=120)"
        in done.fault
    )


def test_evaluate_on_data_that_are_given() -> None:
    scores = json.loads(train("--json").out)
    Path("data.npz").rename("kept.npz")
    done = lowmem_pnn("evaluate run --data npz:kept.npz --json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["test_accuracy"] == scores["test_accuracy"]
    assert lowmem_pnn("evaluate runn --data npz:kept.npz").fault == "runn holds no run; give the folder of one, such as run"


def test_a_finished_run_is_resumed_to_its_result_without_its_data() -> None:
    first = train("--json")
    Path("data.npz").unlink()
    again = lowmem_pnn("fit --resume --workdir run --json")
    assert again.code == 0
    assert again.out == first.out


# Going on after a stop.

_STOPPER = """
import os, signal
from pathlib import Path
import numpy as np
HERE = Path(__file__).parent
class Set:
    classes = ["a", "b", "c"]
    reads = 0
    def __init__(self):
        with np.load(HERE / "data.npz") as file:
            self.x, self.y = file["x_train"], file["y_train"]
    def __len__(self):
        return len(self.x)
    def __getitem__(self, number):
        Set.reads += 1
        if Set.reads == 700 and not (HERE / "marker").exists():
            (HERE / "marker").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return self.x[number], int(self.y[number])
def build():
    return Set()
"""
_OPTIONS = "--epochs 9,3 --cuts 1 --batch-size 16"


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped in an epoch, and what it was trained on."""
    folder = tmp_path_factory.mktemp("stopped")
    write_data(folder / "data.npz")
    (folder / "set.py").write_text(_STOPPER)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = train(_OPTIONS, data="set.py:build")
    assert done.code == 75, done.err
    assert done.fault == "stopped; lowmem-pnn fit --resume --workdir run --trust goes on from the last commit"
    assert "stopping after this batch; once more to stop at once" not in done.out
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not (folder / "run/result.json").exists()
    shutil.copytree(folder, folder.with_name("as-it-was-stopped"))
    return folder


@pytest.fixture
def stopped(stopped_once: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run that was stopped, as it was then, in the working directory."""
    shutil.rmtree(stopped_once)
    shutil.copytree(stopped_once.with_name("as-it-was-stopped"), stopped_once)
    monkeypatch.chdir(stopped_once)
    return stopped_once / "run"


def test_a_stopped_run_goes_on_to_the_same_bits_from_any_folder(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stopped.parent
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    done = lowmem_pnn("fit", "--resume", "--workdir", stopped, "--json", "--trust")
    assert done.code == 0, done.err
    assert json.loads(done.out)["resumed"] == 1
    monkeypatch.chdir(folder)
    assert train(_OPTIONS, data="set.py:build", workdir="whole").code == 0
    assert (stopped / "model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    lines = [len((run / "metrics.jsonl").read_text().splitlines()) for run in (stopped, Path("whole"))]
    assert lines[0] == lines[1]


_HANGS_UP = """
import os, signal
import numpy as np
reads = 0
class Set:
    classes = ["a", "b", "c"]
    def __init__(self):
        with np.load("data.npz") as file:
            self.x, self.y = file["x_train"], file["y_train"]
    def __len__(self):
        return len(self.x)
    def __getitem__(self, number):
        global reads
        reads += 1
        if reads in (300, 301, 302):
            os.kill(os.getpid(), signal.SIGHUP)
        return self.x[number], int(self.y[number])
"""


@pytest.mark.parametrize(("before", "code"), [(signal.SIG_DFL, 75), (signal.SIG_IGN, 0)], ids=["terminal", "nohup"])
def test_a_terminal_that_closes_stops_a_run_as_sigterm_does_unless_it_is_to_outlive_it(
    before: signal.Handlers, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("hangs_up.py").write_text(_HANGS_UP)
    outer = signal.signal(signal.SIGHUP, before)
    try:
        done = train("--epochs 3 --partitions 1", data="hangs_up.py:Set")
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, outer)
    assert done.code == code, done.err
    if code:
        assert done.fault == "stopped; lowmem-pnn fit --resume --workdir run --trust goes on from the last commit"
        assert json.loads(Path("run/journal.json").read_text())["body"]["number"] >= 1
    else:
        assert Path("run/result.json").exists()


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
        (
            lambda run: write_data(run.parent / "data.npz", x_train=np.ones((120, 20), np.float32)),
            "is not what the run in run began with (as many samples, train=108 val=12, but others); bring it back",
        ),
    ],
)
def test_a_damaged_or_changed_run_is_not_gone_on_with(stopped: Path, damage: Any, text: str) -> None:
    damage(stopped)
    done = lowmem_pnn("fit --resume --workdir run --trust")
    assert (done.code, text in done.fault) == (6, True), done.fault
    assert not Path("run/result.json").exists()


@pytest.mark.parametrize("name", ["result.json", "model.safetensors"])
def test_a_finished_run_without_its_files(name: str) -> None:
    assert train().code == 0
    Path("run", name).unlink()
    done = lowmem_pnn("fit --resume --workdir run")
    assert (done.code, f"run/{name}" in done.fault) == (6, True), done.fault
