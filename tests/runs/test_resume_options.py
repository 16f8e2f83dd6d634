"""`fit --resume` with the options of the run, with others, and without a folder; from Python by the same rule."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lowmem_pnn
from helpers.commands import Outcome, write_data
from helpers.commands import lowmem_pnn as command
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import CheckpointError, ConfigError, Stopped
from lowmem_pnn.reporting.progress import Display
from lowmem_pnn.run import provenance as provenance_of_run
from lowmem_pnn.run.process import Process
from lowmem_pnn.training import start

OPTIONS = "--max-gpu-mem 100MB --device cpu --model mlp:20-16-3 --data npz:data.npz --epochs 3 --cuts 1 --batch-size 16 --quiet"
VALUES: dict[str, Any] = {
    "max_gpu_mem": "100MB", "device": "cpu", "model": "mlp:20-16-3", "data": "npz:data.npz", "epochs": 3, "cuts": "1", "batch_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and under `kept` a run in it that was stopped."""
    folder = tmp_path_factory.mktemp("begun")
    write_data(folder / "data.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _stop("runs/a")
    (folder / "runs").rename(folder / "kept")
    return folder


@pytest.fixture
def folder(begun: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, which is the present one, with the stopped run under `runs`. The data's place is part of the run's options."""
    shutil.rmtree(begun / "runs", ignore_errors=True)
    shutil.copytree(begun / "kept", begun / "runs")
    monkeypatch.chdir(begun)
    return begun


def _stop(workdir: str, batches: int = 9, **values: Any) -> None:
    """Begin a run, and stop it in the middle of an epoch."""
    asked = iter([False] * batches)
    process = Process(should_stop=lambda: next(asked, None) is not False)
    with pytest.raises(Stopped):
        start.begin(configure(**{**VALUES, **values}), Path(workdir), process=process)


def resume(options: str) -> Outcome:
    return command(f"fit --resume {options}")


def result_of(workdir: str) -> Any:
    return json.loads((Path(workdir) / "result.json").read_text())


def test_the_same_command_and_resume_goes_on_to_the_same_bits(folder: Path) -> None:
    Path("runs/a/config.toml").unlink()  # as where the process was killed before it wrote it
    done = resume(f"{OPTIONS} --workdir runs/a --json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["resumed"] == 1
    assert command(f"fit {OPTIONS} --workdir whole --overwrite").code == 0
    assert Path("runs/a/config.toml").read_bytes() == Path("whole/config.toml").read_bytes()
    assert Path("whole/model.safetensors").read_bytes() == Path("runs/a/model.safetensors").read_bytes()
    # A finished run prints its result, whatever is repeated of its options.
    again = resume("--workdir runs/a --epochs 3 --json")
    assert (again.code, again.out) == (0, done.out)
    refused = resume("--workdir runs/a --epochs 2")
    assert (refused.code, "began with --epochs 3, and --epochs 2 is given now" in refused.fault) == (3, True)


def test_the_options_that_a_resume_goes_on_with_are_shown(folder: Path) -> None:
    shown = resume("--workdir runs/a --log-every 7 --print-config")
    assert shown.code == 0, shown.err
    assert {'model = "mlp:20-16-3"', "epochs = [3]", "log_every = 7"} <= set(shown.out.splitlines())
    assert "began with --max-gpu-mem 100.0MB" in resume("--workdir runs/a --max-gpu-mem 1G --print-config").fault
    assert not Path("runs/a/result.json").exists()


@pytest.mark.parametrize("more", ["--commit-every 7", "--keep-commits 2", "--log-every 1", "--max-disk 1GB", "--debug"])
def test_options_that_change_nothing_may_differ(more: str, folder: Path) -> None:
    done = resume(f"{OPTIONS} --workdir runs/a {more}")
    assert done.code == 0, done.err
    if "--log-every" in more:
        lines = [json.loads(line) for line in Path("runs/a/metrics.jsonl").read_text().splitlines()]
        assert any("step" in line for line in lines)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ("--epochs 2", "the run in runs/a began with --epochs 3, and --epochs 2 is given now; leave it out to resume the run"),
        ("--max-gpu-mem 200MB", "began with --max-gpu-mem 100.0MB, and --max-gpu-mem 200.0MB is given now"),
        ("--precision bf16 --seed 3", "began with --seed 0, --precision fp32, and --seed 3, --precision bf16 are given now"),
        ("--overwrite", "--resume goes on with a run, and --overwrite replaces it; give one"),
    ],
)
def test_options_that_would_change_the_result_are_refused(more: str, text: str, folder: Path) -> None:
    before = Path("runs/a/journal.json").read_bytes()
    done = resume(f"--workdir runs/a {more}")
    assert (done.code, text in done.fault) == (3, True), done.fault
    assert Path("runs/a/journal.json").read_bytes() == before


def test_without_a_folder_the_only_unfinished_run_of_the_same_command_goes_on(folder: Path) -> None:
    _stop("runs/other", seed=5)
    (Path("runs") / "a file").touch()
    assert "several unfinished runs began with these options: runs/a, runs/other; give --workdir DIR" in resume("").fault
    assert resume("").code == 3
    done = resume(OPTIONS + " --commit-every 1")
    assert done.code == 0, done.err
    assert result_of("runs/a")["resumed"] == 1
    none = resume(OPTIONS)
    assert none.code == 3
    assert "no unfinished run in runs began with these options; unfinished there: runs/other; give --workdir DIR" in none.fault
    # Some of its options are enough where no budget says that they are all; and none of them, where only one is left.
    assert resume("--seed 5").code == 0
    assert result_of("runs/other")["resumed"] == 1
    assert resume("").fault == "--resume: there is no unfinished run in runs; give --workdir DIR, or leave --resume out to begin"


def test_a_command_with_more_options_is_another_run(folder: Path) -> None:
    assert resume(f"{OPTIONS} --lr 0.5").code == 3
    # The run began with more than this.
    assert resume("--max-gpu-mem 100MB --model mlp:20-16-3 --data npz:data.npz").code == 3


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3))


def _data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(90, 20), torch.randint(3, (90,))


class _Interrupt(Display):
    """Interrupts the run in its second epoch."""

    def start_epoch(self, title: str, epoch: int, epochs: int, num_samples: int, done: int) -> None:
        if epoch == 1:
            raise KeyboardInterrupt


def test_python_resumes_by_the_same_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"max_gpu_mem": "100MB", "epochs": 2, "device": "cpu", "batch_size": 16, "cuts": "1"}
    with pytest.raises(ConfigError, match="there is no unfinished run in runs"):
        lowmem_pnn.fit(_model, _data(), resume=True, **options)
    whole = lowmem_pnn.fit(_model, _data(), workdir="whole", **options)
    with pytest.raises(KeyboardInterrupt):
        lowmem_pnn.fit(_model, _data(), **options, commit_every=0, display=_Interrupt())
    resumed = lowmem_pnn.fit(_model, _data(), resume=True, **options)
    assert resumed.resumed == 1
    assert Path(resumed.weights_file).read_bytes() == Path(whole.weights_file).read_bytes()
    with pytest.raises(ConfigError, match=r"--epochs 5: partitions of --method pnn learn one after the other"):
        lowmem_pnn.fit(_model, _data(), workdir="whole", resume=True, **{**options, "epochs": 5})
    assert lowmem_pnn.fit(_model, _data(), workdir="whole", resume=True, **options) == whole
    assert lowmem_pnn.fit(_model, _data(), workdir="whole", resume=True, max_gpu_mem="100MB", log_every=3) == whole
    # A share of what is free is a budget that the run need not repeat; any other option that says auto is compared.
    assert lowmem_pnn.fit(_model, _data(), workdir="whole", resume=True, max_gpu_mem="50%") == whole
    with pytest.raises(ConfigError, match="began with --batch-size 16, and --batch-size auto is given now"):
        lowmem_pnn.fit(_model, _data(), workdir="whole", resume=True, **{**options, "batch_size": "auto"})
    with pytest.raises(ConfigError, match=r"^--resume goes on with a run, and --overwrite replaces it; give one$"):
        lowmem_pnn.fit(_model, _data(), workdir="whole", resume=True, overwrite=True, **options)


# More epochs than a run began with.

LONGER: dict[str, Any] = {**VALUES, "method": "exact", "keep_state": True}


def _weights_of(epochs: int, workdir: str, **values: Any) -> bytes:
    start.begin(configure(**{**LONGER, "epochs": epochs, **values}), Path(workdir))
    return Path(workdir, "model.safetensors").read_bytes()


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_that_trains_longer_ends_as_one_that_began_with_so_many_epochs(folder: Path, finished: bool) -> None:
    for name in ("all-epochs", "longer"):
        shutil.rmtree(name, ignore_errors=True)
    whole = _weights_of(5, "all-epochs")
    if finished:
        _weights_of(3, "longer")
    else:
        _stop("longer", **{name: value for name, value in LONGER.items() if name not in VALUES})
    done = resume("--workdir longer --epochs 5 --quiet")
    assert done.code == 0, done.err
    assert Path("longer/model.safetensors").read_bytes() == whole
    assert result_of("longer")["epochs"] == [5, 5]
    assert "\nepochs = [5]\n" in Path("longer/config.toml").read_text()
    again = resume("--workdir longer --json")  # a finished run, by the epochs that it has now
    assert json.loads(again.out)["epochs"] == [5, 5]
    assert resume("--workdir longer --epochs 4").fault.startswith(
        "the run in longer began with --epochs 5, and --epochs 4 is given now"
    )
    assert command("evaluate longer").code == 0


# Outputs of frozen layers are written once where there are several epochs, and are gone when a run is done.
@pytest.mark.parametrize(
    ("epochs", "batches", "values"),
    [(3, 0, {}), (1, 3, {}), (3, 0, {"unfreeze_at": 2})],
    ids=["written again", "never written", "unfrozen"],
)
def test_a_run_with_frozen_layers_trains_longer(folder: Path, epochs: int, batches: int, values: dict[str, Any]) -> None:
    for name in ("all-epochs", "longer"):
        shutil.rmtree(name, ignore_errors=True)
    values = {**values, "freeze": "0.*", "commit_every": 0.0}
    whole = _weights_of(5, "all-epochs", **values)
    if batches:
        _stop("longer", batches, **{**LONGER, "epochs": epochs, **values})
    else:
        _weights_of(epochs, "longer", **values)
    start.resume(Path("longer"), {"epochs": 5})
    assert Path("longer/model.safetensors").read_bytes() == whole
    lines = [json.loads(line) for line in Path("longer/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["action"] == "sweep"] == [1, 2, 3, 4, 5]
    assert [line["macs"] for line in lines] == sorted(line["macs"] for line in lines)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"method": "pnn"}, "--epochs 5: partitions of --method pnn learn one after the other"),
        ({"method": "exact", "lr_schedule": "cosine"}, "--epochs 5: the run began with --lr-schedule cosine over 3 epochs; begin a new run"),
        ({"method": "exact", "early_stop": 2}, "--epochs 5: the run began with --early-stop 2; begin a new run"),
    ],
)  # fmt: skip
def test_a_run_that_would_end_otherwise_does_not_train_longer(folder: Path, values: dict[str, Any], text: str) -> None:
    shutil.rmtree("stopped", ignore_errors=True)
    _stop("stopped", **values)
    assert text in resume("--workdir stopped --epochs 5").fault


def test_a_finished_run_without_its_optimizer_state_does_not_train_longer(folder: Path) -> None:
    start.begin(configure(**{**VALUES, "method": "exact"}), Path("without"))
    assert resume("--workdir without --epochs 5").fault == (
        "the run in without is done, and its optimizer's state went with its end; begin with --keep-state to train further, or begin a new run "
        "with --weights without"
    )


class _Activated(nn.Module):
    """A model of one's own, whose code may be edited between a stop and a resume."""

    def __init__(self, activation: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.first, self.activation, self.last, self.scale = nn.Linear(20, 16), activation, nn.Linear(16, 3), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)) * self.scale)


def test_an_edited_model_is_refused_and_other_threads_are_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TensorDataset(torch.randn(64, 20), torch.randint(0, 3, (64,)))

    def train(model: nn.Module, factor: float = 1.0, **options: Any) -> Any:
        values = {"cuts": "1", "epochs": 2, "batch_size": 16, "max_gpu_mem": "100MB", "device": "cpu"}
        own = lambda outputs, targets: factor * nn.functional.cross_entropy(outputs, targets)  # noqa: E731
        return lowmem_pnn.fit(model, data, workdir="edited", method="exact", loss=own, **{**values, **options})

    class Stop(lowmem_pnn.Callback):
        def on_step_end(self, *_: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(_Activated(nn.ReLU()), callbacks=[Stop()])
    for edited in (_Activated(nn.GELU()), _Activated(nn.ReLU(), scale=0.5)):
        with pytest.raises(
            CheckpointError,
            match=r"^the model .* does not compute what it did when the run in edited began: its code, or a package",
        ):
            train(edited, resume=True)
    with pytest.raises(CheckpointError, match=r"^the loss is not the code that the run in edited began with"):
        train(_Activated(nn.ReLU()), factor=2.0, resume=True)
    monkeypatch.setattr(provenance_of_run, "_hardware", lambda device: {"cpu": "none", "threads": "0"})
    result = train(_Activated(nn.ReLU()), resume=True)
    assert [note for note in result.notes if note.startswith("resumed with kernels for none (before: ")]


def test_data_that_has_moved_is_given_anew(folder: Path) -> None:
    shutil.copytree("runs/a", "moved/runs/a")
    (folder / "moved/data.npz").write_bytes((folder / "data.npz").read_bytes())
    (folder / "data.npz").rename("gone.npz")
    try:
        assert "there is no file" in resume("--workdir moved/runs/a --quiet").fault
        assert "leave it out to resume" in resume("--workdir moved/runs/a --quiet --data npz:gone.npz").fault
        done = resume("--workdir moved/runs/a --quiet --data npz:moved/data.npz")
        assert done.code == 0, done.fault
        assert json.loads(Path("moved/runs/a/journal.json").read_text())["body"]["moved"]["data"].endswith("moved/data.npz")
    finally:
        (folder / "gone.npz").rename("data.npz")
