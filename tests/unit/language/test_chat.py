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


def called(**turn: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "time?"}, {"role": "assistant", "tool_calls": [{"name": "clock"}], **turn}]


def weighted(weight: Any, turn: int = 2) -> list[dict[str, Any]]:
    return [{**one, "weight": weight} if number == turn else one for number, one in enumerate(TURNS)]


def template(folder: Path, text: str | None) -> ChatTemplate:
    return ChatTemplate(open_tokenizer(str(write_tokenizer(folder, template=text))))


@pytest.mark.parametrize("text", [TEMPLATE, MARKED, MARKED.replace("{% generation %}", "{%- generation -%}")])
def test_the_assistants_turns_are_told_apart(text: str, tmp_path: Path) -> None:
    rendered, spans = template(tmp_path, text).render(TURNS, "line 1")
    assert rendered == "<system>be kind<end><user>hi<end><assistant>hello<end><user>bye<end><assistant>see you<end>"
    assert [rendered[begin:end] for begin, end in spans] == ["hello<end>", "see you<end>"]
    weights = [{**turn, "weight": int(turn["role"] == "assistant")} for turn in TURNS]
    assert template(tmp_path, text).render(weights, "line 1") == (rendered, spans)


def test_turns_that_are_not_to_be_learnt_are_not(tmp_path: Path) -> None:
    by = template(tmp_path, TEMPLATE)
    for turns in (
        weighted(0),
        [{**turn, "train": turn["content"] == "see you"} for turn in TURNS if turn["role"] == "assistant"],
    ):
        rendered, spans = by.render(turns, "line 1")
        assert [rendered[begin:end] for begin, end in spans] == ["see you<end>"]
    with pytest.raises(DataError, match=r"turn 3 is not to be learnt, and --loss-on all learns all; leave one of the two out"):
        by.text(weighted(0), "line 1")
    assert by.text(weighted(1, turn=1), "line 1") == by.text(TURNS, "line 1")
    with pytest.raises(DataError, match=r"turn 3 has 'weight' 0.5; give 0 or 1"):
        by.text(weighted(0.5), "line 1")
    text = f"{TEMPLATE}{{{{ messages[-1].tool_calls[0].name }}}}"
    assert template(tmp_path, text).text(called(content=""), "line 1").endswith("<assistant><end>clock")


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
        (
            f"{TEMPLATE}{{% if add_generation_prompt %}}<think>{{% endif %}}",
            TURNS,
            "line 7: the chat template begins what the assistant is to say (add_generation_prompt) with words that its turn does not begin "
            "with, so what the assistant says",
        ),
        (
            TEMPLATE,
            called(content=""),
            "line 7: turn 2 has 'tool_calls', and the chat template has no place for it; give a template",
        ),
        (
            f"{TEMPLATE}{{# tool_calls #}}",
            called(content=None),
            "line 7: turn 2 has no content, and the chat template says 'None'",
        ),
        (
            f"{TEMPLATE}{{# tool_calls #}}",
            called(content=[{"type": "text", "text": "Hi"}]),
            "line 7: turn 2 has a list as content, and the chat template says \"[{'type': 'text', 'text': 'Hi'}]\" for it; give it its text",
        ),
        (TEMPLATE, weighted(0.5), "line 7: turn 3 has 'weight' 0.5; give 0 or 1, or leave it out"),
        (
            TEMPLATE,
            weighted(1, turn=1),
            "line 7: turn 2 has 'weight' 1, and of the turns only the assistant's are learnt; leave it out",
        ),
        (MARKED, weighted(0), "line 7: turn 3 is not to be learnt, and the chat template marks what is"),
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
