"""Conversations as text: what the assistant says, by either kind of template, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from helpers.language import MARKED, TEMPLATE, write_tokenizer
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.language.chat import ChatTemplate
from lowmem_pnn.language.tokenizer import open_tokenizer

TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see you"},
]


def template(folder: Path, text: str | None) -> ChatTemplate:
    return ChatTemplate(open_tokenizer(str(write_tokenizer(folder, template=text))))


@pytest.mark.parametrize("text", [TEMPLATE, MARKED, MARKED.replace("{% generation %}", "{%- generation -%}")])
def test_the_assistants_turns_are_told_apart(text: str, tmp_path: Path) -> None:
    rendered, spans = template(tmp_path, text).render(TURNS, "line 1")
    assert rendered == "<system>be kind<end><user>hi<end><assistant>hello<end><user>bye<end><assistant>see you<end>"
    assert [rendered[begin:end] for begin, end in spans] == ["hello<end>", "see you<end>"]


def test_special_tokens_are_known_to_the_template(tmp_path: Path) -> None:
    assert template(tmp_path, "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}").text(TURNS, "x") == "<begin>be kind<end>"


def test_tools_are_shown_to_a_template_that_has_a_place_for_them(tmp_path: Path) -> None:
    tools = [{"name": "clock"}]
    text = f"{{% for tool in tools or [] %}}[{{{{ tool.name }}}}]{{% endfor %}}{TEMPLATE}"
    rendered, spans = template(tmp_path, text).render(TURNS, "line 1", tools)
    assert rendered.startswith("[clock]<system>be kind<end>")
    assert [rendered[begin:end] for begin, end in spans] == ["hello<end>", "see you<end>"]
    assert template(tmp_path, text).text(TURNS, "line 1").startswith("<system>")
    with pytest.raises(
        DataError, match=r"^line 1 has 'tools', and the chat template has no place for them; give a template that has"
    ):
        template(tmp_path, TEMPLATE).render(TURNS, "line 1", tools)


@pytest.mark.parametrize(
    ("text", "messages", "message"),
    [
        (
            "{{ raise_exception('no system') }}",
            TURNS,
            "line 7: the chat template does not take the messages: TemplateError: no system",
        ),
        ("{{ messages[0].nothing.more }}", TURNS, "line 7: the chat template does not take the messages: UndefinedError: "),
        (
            "{% for m in messages %}{{ m.content if loop.last else '' }}{% endfor %}",
            TURNS,
            "line 7: the chat template changes earlier turns where later ones come, so what the assistant says cannot be told apart; give a "
            "template that marks it ({% generation %}), or --loss-on all",
        ),
    ],
)
def test_templates_that_do_not_do(text: str, messages: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        template(tmp_path, text).render(messages, "line 7")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data with messages needs a chat template, and --tokenizer .* has none; give the folder"
    ):
        template(tmp_path, None)
    with pytest.raises(ConfigError, match=r"--tokenizer bytes has none"):
        ChatTemplate(open_tokenizer("bytes"))
