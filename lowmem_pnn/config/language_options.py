"""Options of language data: how text becomes tokens, and tokens samples. No torch here: the command line reads this file to print its help."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

LANGUAGE_KINDS = ("text", "jsonl", "tokens")
"""What stands before the colon of data that is text or tokens, whatever else is asked for."""
ROWS_OF_TEXT = ("parquet", "hfdata")
"""What stands before the colon of data that is text where there is a tokenizer for it."""


def _texts(value: Any) -> Any:
    """A text, or several: commas are part of it."""
    if value is None:
        return None
    texts = value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("a text to go on with is empty, or no text; give one with a letter at least")
    return tuple(texts) or None


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LanguageOptions:
    """Options of `FitConfig` that are about language data."""

    tokenizer: Annotated[str | None, BeforeValidator(lambda value: None if value is None else str(value))] = Field(
        default=None,
        description=(
            "Tokenizer of text: bytes, a tokenizer.json, or a folder with one, such as a model's, whose chat template is taken too. With it "
            "parquet: and hfdata: are rows of text. By default bytes."
        ),
    )
    context: PositiveInt | None = Field(
        default=None,
        description="Tokens of a sample of text; by default what a gpt: model takes, else 256 (or fewer, if hf: has).",
    )
    target_context: PositiveInt | None = Field(
        default=None,
        description="Tokens of the target of a sample, where a model reads a text and writes another; by default as --context.",
    )
    pack: bool = Field(
        default=False,
        description=(
            "Put several documents into one sample, kept apart by position_ids that begin anew in each; the model has to take these. "
            "By default each is padded (text: windows of one stream)."
        ),
    )
    sample: Annotated[tuple[str, ...] | None, BeforeValidator(_texts)] = Field(
        default=None,
        description=(
            "Text that the model goes on with before training and after it, by the likeliest tokens; several times for several. What it says "
            "is shown, and in result.json. Every token takes a reading of all weights that do not stay in the budget."
        ),
    )
    sample_tokens: PositiveInt = Field(default=40, description="Tokens that are said of each --sample, at most.")
    loss_on: Literal["completions", "all"] = Field(
        default="completions",
        description=(
            "What is learnt of prompts and completions, and of messages. completions: the completion, and what the assistant says. all: "
            "the prompt, and all turns, too."
        ),
    )
