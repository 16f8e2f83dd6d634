"""The command `completion`: a script that has bash, zsh or fish complete commands, options and their values, made of the parsers."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import click

from lowmem_pnn.cli.lists import DATA, MODELS
from lowmem_pnn.cli.output import print_result
from lowmem_pnn.config.task_options import Task

_PROGRAM = "lowmem-pnn"
_WORD = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_HELP_WIDTH = 70


@dataclass(frozen=True)
class CompletedOption:
    """An option as shells complete it.

    Args:
        names: as they are typed: `--fused`, `--no-fused`.
        text: what it is about, in a few words.
        takes_value: whether a value comes after it.
        words: values that it may have, or that they may begin with.
        takes_files: whether its value may be a file or a folder.
    """

    names: tuple[str, ...]
    text: str
    takes_value: bool
    words: tuple[str, ...]
    takes_files: bool


@dataclass(frozen=True)
class CompletedCommand:
    """A command as shells complete it.

    Args:
        name: its name.
        text: what it does, in a few words.
        options: its options.
        words: values of its argument; none where it is a file or a folder, or there is no argument.
        takes_files: whether its argument is a file or a folder.
    """

    name: str
    text: str
    options: tuple[CompletedOption, ...]
    words: tuple[str, ...]
    takes_files: bool


def completed_commands(group: click.Group) -> list[CompletedCommand]:
    """Return the commands of a group, with all of their options."""
    found = []
    parent = click.Context(group, **group.context_settings)  # commands keep the help option that they are first asked for
    for name, command in group.commands.items():
        context = click.Context(command, parent, info_name=name)
        params = command.get_params(context)
        arguments = [param for param in params if isinstance(param, click.Argument)]
        words = tuple(str(word) for param in arguments if isinstance(param.type, click.Choice) for word in param.type.choices)
        files = any(isinstance(param.type, click.Path) for param in arguments)
        options = tuple(_option(param) for param in params if isinstance(param, click.Option) and not param.hidden)
        found.append(CompletedCommand(name, command.get_short_help_str(_HELP_WIDTH), options, words, files))
    return found


def _option(param: click.Option) -> CompletedOption:
    names = tuple(name for name in (*param.opts, *param.secondary_opts) if name.startswith("--"))
    text = (param.help or "").split(". ")[0].split(" [default")[0].rstrip(".")
    text = text if len(text) <= _HELP_WIDTH else f"{text[: _HELP_WIDTH - 3].rpartition(' ')[0]}..."
    if param.is_flag or param.count:
        return CompletedOption(names, text, False, (), False)
    shown = get_args(Task) if param.name == "task" else re.split(r"[|,]", param.metavar or "")  # of tasks the help shows but some
    listed = {"model": MODELS, "data": DATA}.get(param.name or "")
    words = tuple(word for word in shown if _WORD.fullmatch(word)) if listed is None else _beginnings(listed)
    files = isinstance(param.type, click.Path) or bool({"FILE", "DIR"} & set(shown)) or listed is not None
    return CompletedOption(names, text, True, words, files)


def _beginnings(names: Iterable[str]) -> tuple[str, ...]:
    """Return names up to what is a user's own in them: `npz:FILE` is `npz:`."""
    words = []
    for name in (part for listed in names for part in listed.split(", ")):
        before, colon, _ = name.partition(":")
        if _WORD.fullmatch(before) and not (colon and "." in before):  # not package.module:factory
            words.append(before + colon)
    return tuple(dict.fromkeys(words))


def bash_script(commands: Sequence[CompletedCommand]) -> str:
    """Return the script for bash, which splits words at `:` and `=`."""
    by_reply: dict[tuple[tuple[str, ...], bool], list[str]] = {}
    for command in commands:
        for option in command.options:
            if option.takes_value:
                by_reply.setdefault((option.words, option.takes_files), []).extend(
                    f'"{command.name} {name}"' for name in option.names
                )
    values = "".join(
        f"        {' | '.join(patterns)})\n            {_bash_reply(*reply)}\n            return\n            ;;\n"
        for reply, patterns in by_reply.items()
    )
    others = "".join(
        f"        {command.name})\n            options={_quoted(' '.join(name for option in command.options for name in option.names))}\n"
        f"            [[ $cur == -* ]] || {{ {_bash_reply(command.words, command.takes_files)}; }}\n            ;;\n"
        for command in commands
    )
    names = _quoted(" ".join(command.name for command in commands))
    return f"""# Completion of {_PROGRAM} for bash: source it, or write it to ~/.local/share/bash-completion/completions/{_PROGRAM}
_lowmem_pnn_words() {{
    COMPREPLY+=($(compgen -W "$1" -- "$cur"))
    [[ ${{#COMPREPLY[@]}} -eq 1 && ${{COMPREPLY[0]}} == *: ]] && compopt -o nospace 2> /dev/null
}}
_lowmem_pnn_files() {{
    local IFS=$'\\n'
    compopt -o filenames 2> /dev/null
    COMPREPLY+=($(compgen -f -- "$cur"))
}}
_lowmem_pnn() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD - 1]}} options=""
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        _lowmem_pnn_words {names}
        return
    fi
    if [[ $cur == : || $prev == : ]]; then
        [[ $cur == : ]] && cur=""
        _lowmem_pnn_files
        return
    fi
    if [[ $cur == = ]]; then
        cur=""
    elif [[ $prev == = ]]; then
        prev=${{COMP_WORDS[COMP_CWORD - 2]}}
    fi
    case "${{COMP_WORDS[1]}} $prev" in
{values}    esac
    case "${{COMP_WORDS[1]}}" in
{others}    esac
    [[ ${{#COMPREPLY[@]}} -gt 0 ]] || _lowmem_pnn_words "$options"
}}
complete -F _lowmem_pnn {_PROGRAM}
"""


def _bash_reply(words: tuple[str, ...], files: bool) -> str:
    calls = [f"_lowmem_pnn_words {_quoted(' '.join(words))}"] if words else []
    return "; ".join([*calls, *(["_lowmem_pnn_files"] if files else [])]) or ":"


def zsh_script(commands: Sequence[CompletedCommand]) -> str:
    """Return the script for zsh."""
    described = "\n".join(f"        {_quoted(f'{command.name}:{command.text}')}" for command in commands)
    cases = []
    for command in commands:
        specs = [spec for option in command.options for spec in _zsh_specs(option)]
        if command.words or command.takes_files:
            specs.append(f"*:argument:{_zsh_action(command.words, command.takes_files)}")
        lines = " \\\n".join(f"                {_quoted(spec)}" for spec in specs)
        cases.append(f"        {command.name})\n            _arguments \\\n{lines}\n            ;;\n")
    return f"""#compdef {_PROGRAM}
# Completion of {_PROGRAM} for zsh: write it to a file _{_PROGRAM} in a folder of $fpath, or source it after compinit.
_lowmem_pnn() {{
    local -a commands=(
{described}
    )
    if ((CURRENT == 2)); then
        _describe command commands
        return
    fi
    shift words
    ((CURRENT--))
    case $words[1] in
{"".join(cases)}    esac
}}
if [[ $funcstack[1] == _{_PROGRAM} ]]; then
    _lowmem_pnn "$@"
else
    compdef _lowmem_pnn {_PROGRAM}
fi
"""


def _zsh_specs(option: CompletedOption) -> list[str]:
    text = re.sub(r"([\[\]\\])", r"\\\1", option.text)
    value = f":value:{_zsh_action(option.words, option.takes_files)}" if option.takes_value else ""
    equals = "=" if option.takes_value else ""
    return [f"*{name}{equals}[{text}]{value}" for name in option.names]


def _zsh_action(words: tuple[str, ...], files: bool) -> str:
    """Return what gives the values of an option or argument; its own colons are escaped."""
    action = f"({' '.join(words)})" if words else "_files" if files else " "
    if words and files:
        # What comes after a word's colon is a file.
        action = f"{{ if compset -P '*:'; then _files; else compadd -S '' -- {' '.join(words)}; _files; fi }}"
    return action.replace(":", "\\:")


def fish_script(commands: Sequence[CompletedCommand]) -> str:
    """Return the script for fish."""
    lines = [
        f"# Completion of {_PROGRAM} for fish: write it to ~/.config/fish/completions/{_PROGRAM}.fish",
        f"complete -c {_PROGRAM} -f",
    ]
    for command in commands:
        lines.append(f"complete -c {_PROGRAM} -n __fish_use_subcommand -a {command.name} -d {_fish_quoted(command.text)}")
        inside = f"complete -c {_PROGRAM} -n '__fish_seen_subcommand_from {command.name}'"
        if command.words:
            lines.append(f"{inside} -a {_fish_quoted(' '.join(command.words))}")
        if command.takes_files:
            lines.append(f"{inside} -F")
        for option in command.options:
            value = ""
            if option.takes_value:
                words = f" -a {_fish_quoted(' '.join(option.words))}" if option.words else ""
                value = (" -r -F" if option.takes_files else " -x") + words
            lines += [f"{inside} -l {name.removeprefix('--')}{value} -d {_fish_quoted(option.text)}" for name in option.names]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: Mapping[str, Callable[[Sequence[CompletedCommand]], str]] = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}
"""Shells, and what writes their scripts."""


@click.command()
@click.argument("shell", type=click.Choice([*SHELLS]), metavar="bash|zsh|fish")
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print a script that has a shell complete commands, options and their values: source <(lowmem-pnn completion bash)."""
    group = context.find_root().command
    assert isinstance(group, click.Group)
    print_result(SHELLS[shell](completed_commands(group)).rstrip("\n"))
