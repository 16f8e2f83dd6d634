"""Prompts begin as texts do, and end where they end; what comes after them is text without them."""

from pathlib import Path

from helpers.language import write_tokenizer
from lowmem_pnn.language.prompts import prompt_tokens, said_text
from lowmem_pnn.language.tokenizer import open_tokenizer


def test_a_prompt_begins_with_the_token_that_texts_begin_with(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path, begins=True)))
    tokens = prompt_tokens(tokenizer, "the cat")
    assert tokens[0] == 2
    assert 0 not in tokens
    assert said_text(tokenizer, tokens, [*tokenizer.encode([" sat on"])[0], 0]) == " sat on"


def test_bytes_that_make_no_text_are_shown_as_such() -> None:
    tokenizer = open_tokenizer("bytes")
    assert said_text(tokenizer, prompt_tokens(tokenizer, "é"), [195, 169, 195]) == "é\ufffd"
