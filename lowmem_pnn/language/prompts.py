"""Prompts: texts that a language model is to go on with, or to write others for, as tokens, and what it says as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem_pnn.language.tokenizer import Tokenizer, bare, check_trained_by, open_tokenizer


def tokenizer_of(data: str, preparation: Mapping[str, Any], asked: str | None = None) -> Tokenizer | None:
    """Return the tokenizer of a run's data; None where the data is numbers of tokens, whose texts nobody knows.

    Args:
        data: Name of the data.
        preparation: What its samples were made with (`Dataset.preparation`).
        asked: Tokenizer that was asked for.

    Raises:
        ConfigError: It cannot be opened, or is not as it was in training, and nobody asked for it.
    """
    spec = asked or preparation.get("tokenizer") or ("bytes" if data.startswith("text:") else None)
    if spec is None:
        return None
    tokenizer = open_tokenizer(str(spec))
    if asked is None:
        remedy = f", or say that it is to be taken (--tokenizer {spec})"
        check_trained_by(tokenizer.name, tokenizer.fingerprint, preparation.get("tokenizer_fingerprint"), remedy)
    return tokenizer


def prompt_tokens(tokenizer: Tokenizer, text: str, source_context: int | None = None) -> list[int]:
    """Return the tokens of a text that is to be gone on with, or for which another is to be written.

    What is gone on with has the tokens that a text begins with, and not its end; a source is wrapped as the tokenizer wraps a text, and cut
    so that its end stays. None of these tokens is put twice, where the text has them itself.

    Args:
        tokenizer: Tokenizer of the model.
        text: The text.
        source_context: Most tokens of a source; None for a text that is gone on with.

    Example:
        >>> from lowmem_pnn.language.tokenizer import ByteTokenizer
        >>> prompt_tokens(ByteTokenizer(), "abc"), prompt_tokens(ByteTokenizer(), "abc", source_context=2)
        ([97, 98, 99], [97, 98])
    """
    found = tokenizer.encode([text])[0]
    ids = bare(found, tokenizer.begin, () if source_context is None else tokenizer.after).tolist()
    if source_context is None:
        return [*tokenizer.begin, *ids]
    room = max(source_context - len(tokenizer.begin) - len(tokenizer.after), 0)
    return [*tokenizer.begin, *ids[:room], *tokenizer.after][:source_context]


def plain_prompts(preparation: Mapping[str, Any]) -> str | None:
    """Say that prompts are no turns of a conversation, where that is what a model has learnt; else None.

    Args:
        preparation: As for `tokenizer_of`.
    """
    if preparation.get("documents") != "chat":
        return None
    return (
        "prompts are given as they are, not as turns: the model has learnt conversations by the chat template of its tokenizer, so give "
        "what that makes of one (apply_chat_template with tokenize=False, add_generation_prompt=True)"
    )


def said_text(tokenizer: Tokenizer, prompt: Sequence[int] | None, tokens: Sequence[int]) -> str:
    """Return what tokens say.

    Some tokenizers leave out the space that a text begins with: so after a prompt the whole is made text, and what the prompt is of it cut off.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: Tokens of the prompt that they go on with; None where they are a text of their own.
        tokens: The tokens.
    """
    if prompt is None:
        return tokenizer.decode(list(tokens))
    before, whole = tokenizer.decode(list(prompt)), tokenizer.decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(tokens))
