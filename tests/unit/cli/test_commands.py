"""Commands: help, usage, options that nothing can be done with, and what becomes of faults; no run begins.

PYTHONPATH=tests python tests/unit/cli/test_commands.py  # writes golden/*.txt anew
"""

import errno
from pathlib import Path

import pytest
import torch

from helpers.commands import lowmem_pnn
from lowmem_pnn.config.fit_config import field_names

pytestmark = pytest.mark.usefixtures("data_folder")


GOLDEN = Path(__file__).parent / "golden"
COMMANDS = [
    "", "fit", "plan", "evaluate", "predict", "generate", "export", "report", "bench", "doctor", "models", "data", "methods", "completion",
    "fit-all", "plan-all",
]  # fmt: skip


def help_of(command: str) -> str:
    """Return the command line that shows the help of a command, or all of it for `COMMAND-all`."""
    return f"{command.removesuffix('-all')} {'--help-all' if command.endswith('-all') else '--help'}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_as_it_was_last_read(command: str) -> None:
    shown = lowmem_pnn(help_of(command))
    assert shown.code == 0
    assert shown.out == (GOLDEN / f"help-{command or 'all'}.txt").read_text(), "if it is meant, run this file"


def test_the_command_alone_shows_its_help() -> None:
    alone = lowmem_pnn("")
    assert (alone.code, alone.err) == (0, "")
    assert alone.out == lowmem_pnn("--help").out


def test_the_short_help_fits_a_screen_and_the_long_one_has_every_option() -> None:
    short = lowmem_pnn("fit --help").out
    assert short.count("\n") < 90
    everything = lowmem_pnn("fit --help-all").out
    assert all(f"--{name.replace('_', '-')}" in everything for name in field_names())


def test_the_help_of_a_bench_leaves_out_what_it_refuses_and_defaults_of_one_run() -> None:
    shown = lowmem_pnn("bench --help-all").out
    for name in ("epochs", "val-fraction", "recovery-epochs", "meta-epochs", "sample", "logger"):
        assert f"\n  --{name} " not in shown
    assert "[default: pnn]" not in shown
    assert "\n  --lr X" in shown


def test_version() -> None:
    assert lowmem_pnn("--version").out.startswith("lowmem-pnn, version ")


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("fitt", "no such command 'fitt'; did you mean 'fit'? lowmem-pnn --help lists what there is"),
        ("train", "no such command 'train'; did you mean 'fit'? lowmem-pnn --help lists what there is"),
        ("fit --epoch 1", "no such option '--epoch'; did you mean '--epochs'? lowmem-pnn fit --help lists what there is"),
        ("fit --budget 1GB", "no such option '--budget'; did you mean '--max-gpu-mem'?"),
        ("fit --learning-rate 1", "no such option '--learning-rate'; did you mean '--lr'?"),
        ("fit --qqq 1", "no such option '--qqq'; lowmem-pnn fit --help lists what there is"),
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


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        ("fit", 2, "--max-gpu-mem is missing; give --max-gpu-mem 2GB"),
        ("fit --max-gpu-mem '512 megs'", 3, "--max-gpu-mem: '512 megs' is not a size; write 512MB or 512MiB"),
        ("fit --max-gpu-mem 2", 3, "--max-gpu-mem 2 is 2 bytes; did you mean 2GB?"),
        ("fit --max-gpu-mem 150%", 3, "--max-gpu-mem 150% is no share of what is available; write 75%, or auto for 80%"),
        ("plan --max-gpu-mem 1G --budgets 1G,2G", 3, "--max-gpu-mem and --budgets exclude each other; give one"),
        ("plan --budgets 1G,2Q", 3, "'2Q' is not a size"),
        ("fit --max-gpu-mem -5MB", 3, "'-5MB' is not a size"),
        ("fit --max-gpu-mem 0", 3, "'0' is a size of 0 bytes; write a positive one"),
        (
            "fit --max-gpu-mem 1GB --model mlp:64-10",
            3,
            "--data is missing; give --data digits, or what else lowmem-pnn data lists",
        ),
        (
            "fit --max-gpu-mem 1GB --method pnm",
            3,
            "--method 'pnm' is none of pnn, neuroflux, incubate, exact, backprop; did you mean 'pnn'?",
        ),
        ("fit --max-gpu-mem 1GB --seed -1", 3, "--seed '-1': must be greater than or equal to 0"),
        ("fit --resume", 3, "--resume: there is no unfinished run in runs; give --workdir DIR, or leave --resume out to begin"),
        (
            "fit --resume --workdir no-run",
            6,
            "no-run holds no run; give the folder of one, or leave --resume out to begin one",
        ),
        (
            "fit --resume --workdir run --epochs 3 --overwrite",
            3,
            "--resume goes on with a run, and --overwrite replaces it; give one",
        ),
        ("evaluate no-run", 6, "no-run holds no run"),
        ("fit --max-gpu-mem 1GB --optimizer sgdd", 3, "--optimizer 'sgdd' is none of sgd, adam, adamw; did you mean 'sgd'?"),
        ("fit --max-gpu-mem 1GB --device gpu", 3, "--device 'gpu' is none of auto, cpu, cuda, cuda:INDEX; did you mean 'cuda'?"),
        ("fit --max-gpu-mem 1GB --device mps", 3, "only NVIDIA's GPUs and the CPU are supported"),
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
        (
            "plan --max-gpu-mem 1GB --no-timing --plan-for time",
            3,
            "--plan-for time goes by layers that are timed, and --no-timing times none; leave one of them out",
        ),
    ],
)
def test_bad_options(line: str, code: int, text: str) -> None:
    done = lowmem_pnn(line)
    assert (done.code, text in done.fault) == (code, True), done.fault
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("more", ["--budget-scope allocator", "--max-host-mem 1GB", "--tf32"])
def test_options_for_a_gpu_on_a_machine_without(more: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = lowmem_pnn(f"fit --max-gpu-mem 100MB --model mlp:20-3 --data npz:data.npz {more}")
    assert done.code == 3
    assert "has no effect here: it needs a CUDA device" in done.fault


def test_a_fault_of_ours_is_code_1_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("two\nlines")

    monkeypatch.setattr("lowmem_pnn.preview.preview.previews", fail)
    done = lowmem_pnn("plan --max-gpu-mem 100MB")
    assert done.code == 1
    assert done.fault == "a fault of its own: AssertionError: two lines; run again with --debug for the traceback"


def test_a_disk_that_fails_where_nobody_foresaw_it_is_code_5(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error", "/somewhere/file")

    monkeypatch.setattr("lowmem_pnn.preview.preview.previews", fail)
    done = lowmem_pnn("plan --max-gpu-mem 100MB")
    assert done.code == 5
    assert done.fault.startswith("cannot go on: input/output error ('/somewhere/file'); check the disk and its access rights")


def test_memory_that_ends_outside_of_training_is_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("lowmem_pnn.preview.preview.previews", fail)
    done = lowmem_pnn("plan --max-gpu-mem 100MB")
    assert done.code == 4
    assert done.fault.startswith("out of memory outside of training (MemoryError:); give a larger --max-gpu-mem")


def write_golden() -> None:
    """Write the help texts as they are now."""
    GOLDEN.mkdir(exist_ok=True)
    for command in COMMANDS:
        (GOLDEN / f"help-{command or 'all'}.txt").write_text(lowmem_pnn(help_of(command)).out)


if __name__ == "__main__":
    write_golden()
