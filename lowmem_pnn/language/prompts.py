"""Prompts: texts that a language model is to go on with, as tokens, and what it says as text."""

from collections.abc import Sequence

from lowmem_pnn.language.tokenizer import Tokenizer


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
