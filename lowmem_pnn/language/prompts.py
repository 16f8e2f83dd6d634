"""Prompts: texts that a language model is to go on with, as tokens, and what it says as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem_pnn.language.tokenizer import Tokenizer, check_trained_by, open_tokenizer


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


def prompt_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the tokens of a text that is to be gone on with: with the tokens that a text begins with, and without its end.

    Args:
        tokenizer: Tokenizer of the model.
        text: The text.

    Example:
        >>> from lowmem_pnn.language.tokenizer import ByteTokenizer
        >>> prompt_tokens(ByteTokenizer(), "ab")
        [97, 98]
    """
    return [*tokenizer.begin, *tokenizer.encode([text])[0].tolist()]


def continuation_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Return what tokens say after a prompt.

    Some tokenizers leave out the space that a text begins with: so the whole is made text, and what the prompt is of it cut off.

    Args:
        tokenizer: Tokenizer of the model.
        prompt: Tokens of the prompt.
        tokens: Tokens after it.
    """
    before, whole = tokenizer.decode(list(prompt)), tokenizer.decode([*prompt, *tokens])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(tokens))
