"""Prompts begin as texts do, and end where they end; what comes after them is text without them."""

from pathlib import Path

import pytest

from helpers.language import write_tokenizer
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.language.prompts import prompt_tokens, said_text, tokenizer_of
from lowmem_pnn.language.tokenizer import open_tokenizer


def test_a_prompt_begins_with_the_token_that_texts_begin_with(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path, begins=True)))
    tokens = prompt_tokens(tokenizer, "the cat")
    assert tokens[0] == 2
    assert 0 not in tokens
    assert prompt_tokens(tokenizer, "<begin>the cat") == tokens
    assert prompt_tokens(tokenizer, "<begin>the cat", source_context=9) == prompt_tokens(tokenizer, "the cat", source_context=9)
    assert said_text(tokenizer, tokens, [*tokenizer.encode([" sat on"])[0], 0]) == " sat on"


def test_bytes_that_make_no_text_are_shown_as_such() -> None:
    tokenizer = open_tokenizer("bytes")
    assert said_text(tokenizer, prompt_tokens(tokenizer, "é"), [195, 169, 195]) == "é\ufffd"


def test_a_tokenizer_that_was_changed_since_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t")
    made = {"tokenizer": str(folder), "tokenizer_fingerprint": open_tokenizer(str(folder)).fingerprint}
    assert tokenizer_of("jsonl:a", made) is not None
    write_tokenizer(folder, begins=True)
    with pytest.raises(
        ConfigError,
        match=r"^tokenizer .*/t is another one than the run was trained with; put it back, or say .* \(--tokenizer .*/t\)$",
    ):
        tokenizer_of("jsonl:a", made)
    assert tokenizer_of("jsonl:a", made, str(folder)) is not None
    assert tokenizer_of("jsonl:a", {"tokenizer": str(folder)}) is not None
