"""Conversations as text, by the template of a tokenizer, and which characters of it an assistant says."""

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.language.columns import json_type
from lowmem_pnn.language.tokenizer import Tokenizer
from lowmem_pnn.sources.imports import one_line

Spans = list[tuple[int, int]]
"""Ranges of characters, [begin, end) each."""

_MARKED = "generation"
# Keys of a turn that say something to be learnt, and are lost where a template has no word for them; weights of a turn.
_SAYING, _WEIGHTS = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"), ("weight", "train")


class ChatTemplate:
    """Template that makes a text of a conversation.

    Args:
        tokenizer: Tokenizer that the template belongs to.

    Raises:
        ConfigError: It has no template, or what renders templates is not installed.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"data with messages needs a chat template, and --tokenizer {tokenizer.name} has none; give the folder of a tokenizer with "
                "one (chat_template.jinja), or columns prompt and completion"
            )
        try:
            self._render_many: Any = importlib.import_module("transformers.utils.chat_template_utils").render_jinja_template
            importlib.import_module("jinja2")
        except ImportError as error:
            raise ConfigError(
                "data with messages needs transformers and jinja2, which render templates; run: pip install 'lowmem-pnn[hf]'"
            ) from error
        self._template, self._tokens = tokenizer.chat_template, tokenizer.special_tokens
        self._marks = f"{{% {_MARKED} %}}" in self._template.replace("{%-", "{%").replace("-%}", "%}")

    def render(self, messages: Sequence[Any], where: str, tools: Sequence[Any] | None = None) -> tuple[str, Spans]:
        """Return the text of a conversation, and the ranges of it that the assistant says.

        A template that marks them (`{% generation %}`) tells; of others the text up to a turn is compared with the text after it. Turns with
        `weight` 0, or `train` false, are not among them.

        Args:
            messages: Turns, each with `role` and `content`.
            where: Place of the conversation in messages.
            tools: JSON schemas of the tools that the assistant may call; None where there are none.

        Raises:
            DataError: The template does not take it, or makes a text of it whose turns cannot be told apart.
        """
        self._check(messages, where, tools)
        _check_weights(messages, where)
        for number, turn in enumerate(messages, 1):
            if turn.get("role") != "assistant" and (key := next((one for one in _WEIGHTS if turn.get(one)), None)) is not None:
                raise DataError(
                    f"{where}: turn {number} has {key!r} {turn[key]!r}, and of the turns only the assistant's are learnt; leave it out there, "
                    "or give --loss-on all"
                )
        # Of other roles nothing is learnt anyway, so that their weights change nothing.
        learnt = [turn.get("role") != "assistant" or _is_learnt(turn) for turn in messages]
        if self._marks and not all(learnt):
            raise DataError(
                f"{where}: turn {learnt.index(False) + 1} is not to be learnt, and the chat template marks what is ({{% generation %}}); give "
                "a template that marks nothing"
            )
        if self._marks:
            (text,), (spans,) = self._call(messages, where, tools, return_assistant_tokens_mask=True)
            return text, [(int(begin), int(end)) for begin, end in spans]
        text, spans = self._text(messages, where, tools), []
        for number, message in enumerate(messages):
            if message.get("role") != "assistant" or not learnt[number]:
                continue
            before = self._text(messages[:number], where, tools, add_generation_prompt=True) if number else ""
            after = self._text(messages[: number + 1], where, tools)
            fault = None if text.startswith(after) else "changes earlier turns where later ones come"
            if fault is None and not after.startswith(before):
                fault = "begins what the assistant is to say (add_generation_prompt) with words that its turn does not begin with"
            if fault is not None:
                raise DataError(
                    f"{where}: the chat template {fault}, so what the assistant says cannot be told apart; give a template that marks it "
                    "({% generation %}), or --loss-on all"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def text(self, messages: Sequence[Any], where: str, tools: Sequence[Any] | None = None) -> str:
        """Return the text of a conversation, all of which is learnt; arguments and errors as for `render`."""
        self._check(messages, where, tools)
        _check_weights(messages, where)
        for number, turn in enumerate(messages, 1):
            if not _is_learnt(turn):
                raise DataError(
                    f"{where}: turn {number} is not to be learnt, and --loss-on all learns all; leave one of the two out"
                )
        return self._text(messages, where, tools)

    def _check(self, messages: Sequence[Any], where: str, tools: Sequence[Any] | None) -> None:
        """Refuse turns of which the template leaves something out, or says that it is not there."""
        for number, turn in enumerate(messages, 1):
            for key in _SAYING:
                if turn.get(key) and not re.search(rf"\b{key}\b", self._template):
                    raise DataError(
                        f"{where}: turn {number} has {key!r}, and the chat template has no place for it; give a template that has, or leave "
                        "that key out"
                    )
        objects = [
            (number, turn["content"]) for number, turn in enumerate(messages, 1) if not isinstance(turn.get("content"), str)
        ]
        if not objects:
            return
        filled = [turn if isinstance(turn.get("content"), str) else {**turn, "content": ""} for turn in messages]
        written, without = self._text(messages, where, tools), self._text(filled, where, tools)
        for number, content in objects:
            if written.count(str(content)) > without.count(str(content)):
                what, instead = (
                    ("no content", 'the content ""') if content is None else (f"a {json_type(content)} as content", "its text")
                )
                raise DataError(
                    f"{where}: turn {number} has {what}, and the chat template says {str(content)!r:.60} for it; give it {instead}"
                )

    def _text(self, messages: Sequence[Any], where: str, tools: Sequence[Any] | None, **options: Any) -> str:
        (text,), _ = self._call(messages, where, tools, **options)
        return str(text)

    def _call(self, messages: Sequence[Any], where: str, tools: Sequence[Any] | None, **options: Any) -> Any:
        if tools is not None and "tools" not in self._template:
            raise DataError(
                f"{where} has 'tools', and the chat template has no place for them; give a template that has, or leave that column out"
            )
        if tools is not None:
            options["tools"] = list(tools)
        try:
            return self._render_many([list(messages)], chat_template=self._template, **self._tokens, **options)
        except MemoryError:
            raise
        # A template may raise anything: jinja2's errors, TypeError, and what it raises itself.
        except Exception as error:
            raise DataError(
                f"{where}: the chat template does not take the messages: {one_line(error)[:200]}; see to them"
            ) from error


def _is_learnt(turn: Mapping[str, Any]) -> bool:
    return all(turn.get(key, True) for key in _WEIGHTS)


def _check_weights(messages: Sequence[Any], where: str) -> None:
    """Refuse weights of turns that are neither all nor nothing."""
    for number, turn in enumerate(messages, 1):
        for key in _WEIGHTS:
            if key in turn and (not isinstance(turn[key], int | float) or turn[key] not in (0, 1)):
                raise DataError(f"{where}: turn {number} has {key!r} {turn[key]!r}; give 0 or 1, or leave it out")
