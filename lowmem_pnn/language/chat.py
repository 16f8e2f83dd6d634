"""Conversations as text, by the template of a tokenizer, and which characters of it an assistant says."""

import importlib
from collections.abc import Sequence
from typing import Any

from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.language.tokenizer import Tokenizer
from lowmem_pnn.sources.imports import one_line

Spans = list[tuple[int, int]]
"""Ranges of characters, [begin, end) each."""

_MARKED = "generation"


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

        A template that marks them (`{% generation %}`) tells; of others the text up to a turn is compared with the text after it.

        Args:
            messages: Turns, each with `role` and `content`.
            where: Place of the conversation in messages.
            tools: JSON schemas of the tools that the assistant may call; None where there are none.

        Raises:
            DataError: The template does not take it, or makes a text of it whose turns cannot be told apart.
        """
        if self._marks:
            (text,), (spans,) = self._call(messages, where, tools, return_assistant_tokens_mask=True)
            return text, [(int(begin), int(end)) for begin, end in spans]
        text, spans = self.text(messages, where, tools), []
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = self._text(messages[:number], where, tools, add_generation_prompt=True) if number else ""
            after = self._text(messages[: number + 1], where, tools)
            if not (text.startswith(after) and after.startswith(before)):
                raise DataError(
                    f"{where}: the chat template changes earlier turns where later ones come, so what the assistant says cannot be told apart; "
                    "give a template that marks it ({% generation %}), or --loss-on all"
                )
            spans.append((len(before), len(after)))
        return text, spans

    def text(self, messages: Sequence[Any], where: str, tools: Sequence[Any] | None = None) -> str:
        """Return the text of a conversation; arguments and errors as for `render`."""
        return self._text(messages, where, tools)

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
