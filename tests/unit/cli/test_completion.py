"""Scripts that have shells complete commands: run by the shells themselves."""

import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from lowmem_pnn.cli.commands import cli
from lowmem_pnn.cli.completion import SHELLS, completed_commands

# Gives the last word of a command line to the function that `complete` has noted for the command, and prints what it replies.
_ASK_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
read -r _ _ name _ <<< "$(complete -p lowmem-pnn)"
"$name"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, commands = tmp_path_factory.mktemp("completion"), completed_commands(cli)
    for shell, write in SHELLS.items():
        (folder / shell).write_text(write(commands))
    (folder / "files").mkdir()
    (folder / "files" / "net.py").touch()
    return folder


def asked(shell: str, *command: str, cwd: Path | None = None) -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, *command], capture_output=True, text=True, check=True, cwd=cwd)
    assert not done.stderr
    return [line for line in done.stdout.splitlines() if line]


def bash(scripts: Path, *words: str) -> list[str]:
    return asked("bash", "--norc", "-c", _ASK_BASH, "bash", str(scripts / "bash"), "lowmem-pnn", *words, cwd=scripts / "files")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["f"], ["fit"]),
        (["fit", "--meth"], ["--method"]),
        (["bench", "--meth"], ["--method", "--methods"]),
        (["fit", "--method", ""], ["pnn", "neuroflux", "incubate", "exact", "backprop"]),
        (["fit", "--method", "=", "ex"], ["exact"]),
        (["fit", "--method", "="], ["pnn", "neuroflux", "incubate", "exact", "backprop"]),
        (["plan", "--lr-schedule", "co"], ["constant", "cosine"]),
        (["plan", "--lr", ""], []),
        (["fit", "--task", "s"], ["segmentation", "seq2seq", "sequence-classification"]),
        (["fit", "--device", ""], ["auto", "cpu", "cuda"]),
        (["bench", "--methods", ""], ["pnn", "neuroflux", "incubate", "exact", "backprop", "all"]),
        (["bench", "--baselines", ""], ["plain", "checkpointing", "accumulation", "all", "none"]),
        (["fit", "--data", "i"], ["imagefolder:"]),
        (["fit", "--data", "fas"], ["fashion-mnist"]),
        (["fit", "--model", "n"], ["net.py"]),
        (["fit", "--data", "npz", ":"], ["net.py"]),
        (["fit", "--data", "npz", ":", "ne"], ["net.py"]),
        (["fit", "--no-f"], ["--no-fused"]),
        (["evaluate", ""], ["net.py"]),
        (["evaluate", "--tr"], ["--trust"]),
        (["completion", "z"], ["zsh"]),
        (["nothing", ""], []),
    ],
)
def test_bash_completes(words: list[str], expected: list[str], scripts: Path) -> None:
    assert bash(scripts, *words) == expected


def test_every_option_is_completed(scripts: Path) -> None:
    for name, command in cli.commands.items():
        options = {
            option
            for param in command.get_params(click.Context(command, click.Context(cli, **cli.context_settings)))
            if isinstance(param, click.Option) and not param.hidden
            for option in (*param.opts, *param.secondary_opts)
            if option.startswith("--")
        }
        assert set(bash(scripts, name, "--")) == options


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lowmem-pnn f", ["fit"]),
        ("lowmem-pnn fit --meth", ["--method"]),
        ("lowmem-pnn fit --method ", ["backprop", "exact", "incubate", "neuroflux", "pnn"]),
        ("lowmem-pnn completion ", ["bash", "fish", "zsh"]),
        ("lowmem-pnn fit --model n", ["net.py"]),
    ],
)
def test_fish_completes(line: str, expected: list[str], scripts: Path) -> None:
    found = asked("fish", "--no-config", "-c", f"source {scripts / 'fish'}; complete -C '{line}'", cwd=scripts / "files")
    assert [text.partition("\t")[0] for text in found] == expected


# What zsh's completion would be asked to offer, told by doubles of its functions.
_ASK_ZSH = """
compdef() { :; }; _describe() { print -rl -- $commands; }; _arguments() { print -rl -- "$@"; }
source "$1"; shift
words=("$@"); CURRENT=$#
_lowmem_pnn
"""


def test_zsh_is_told_of_commands_and_options(scripts: Path) -> None:
    def zsh(*words: str) -> list[str]:
        return asked("zsh", "-f", "-c", _ASK_ZSH, "zsh", str(scripts / "zsh"), "lowmem-pnn", *words)

    assert [text.partition(":")[0] for text in zsh("")] == list(cli.commands)
    options = zsh("fit", "--m")
    assert "*--method=[Training method]:value:(pnn neuroflux incubate exact backprop)" in options
    assert any(spec.startswith("*--data=[") and "imagefolder\\:" in spec and "_files" in spec for spec in options)
    assert zsh("completion", "") == ["*--help[Show this message and exit]", "*:argument:(bash zsh fish)"]


def test_the_command_prints_it_without_torch() -> None:
    code = (
        "import sys; from lowmem_pnn.cli.commands import main; sys.argv = ['lowmem-pnn', 'completion', 'bash']\n"
        "try: main()\n"
        "finally: print([name for name in ('torch', 'numpy') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert done.stdout == SHELLS["bash"](completed_commands(cli))
