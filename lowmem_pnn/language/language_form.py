"""Form of language data: what a model wants of text, how text becomes samples, and which tokenizers do for that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.language.columns import NEXT_TOKENS, SEQUENCES, Wanted
from lowmem_pnn.language.tokenizer import Tokenizer
from lowmem_pnn.zoo.model_source import too_many_tokens

Purpose = Literal["next-tokens", "classes", "sequences"]
"""What a model learns of text: to go on with it, which class it is of, or which other text is its answer."""


@dataclass(frozen=True)
class Head:
    """What a model wants of text.

    Args:
        purpose: What it learns.
        label: Column of the classes.
        may_lack_labels: Whether texts without classes do, which are to be predicted.
        classes: Names of the classes that the training data has, by their numbers; none where it has none, or this is it.
        padding: Token that it takes for padding; None for the tokenizer's.
        start: Token that its decoder begins with; None where it says none.
        target_context: Tokens of a target; None for as many as of a source.
        model: What the model is called in messages.
        vocabulary: Tokens that it knows; None where it does not say.
        looks_for_padding: Whether it finds the end of a text by the token of its configuration for padding.
        marks_languages: Whether its texts have a token for their language, which source and target do not share.
    """

    purpose: Purpose = "next-tokens"
    label: str = "label"
    may_lack_labels: bool = False
    classes: tuple[str, ...] = ()
    padding: int | None = None
    start: int | None = None
    target_context: int | None = None
    model: str = ""
    vocabulary: int | None = None
    looks_for_padding: bool = False
    marks_languages: bool = False

    @property
    def wanted(self) -> Wanted:
        """Columns that make documents for it."""
        if self.purpose == "classes":
            return Wanted(("labelled", "text") if self.may_lack_labels else ("labelled",), self.label)
        return SEQUENCES if self.purpose == "sequences" else NEXT_TOKENS

    def check(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer whose tokens the model does not know, or takes otherwise than they are meant.

        Args:
            tokenizer: What makes tokens of text.

        Raises:
            ConfigError: The model is not to be trained by it.
        """
        if self.purpose == "sequences" and self.marks_languages:
            raise ConfigError(
                f"model {self.model} marks the language of each text by a token, and no option says which those of source and target are; "
                "give samples from Python, ({'input_ids': x, 'attention_mask': mask, 'decoder_input_ids': ids}, labels)"
            )
        if self.vocabulary is not None and tokenizer.size > self.vocabulary:
            raise ConfigError(too_many_tokens(self.model, self.vocabulary, tokenizer.size))
        if self.looks_for_padding and self.padding is None:
            raise ConfigError(
                f"model {self.model} finds the end of a text by its pad_token_id, and its configuration has none; give --model-arg "
                f"pad_token_id={tokenizer.padding}, the tokenizer's"
            )


@dataclass(frozen=True)
class LanguageForm:
    """How text is to become samples.

    Args:
        tokenizer: `bytes`, a file or a folder; None where nobody says, which is bytes.
        context: Inputs of a row; None for 256.
        packs: Whether documents lie side by side in a row.
        loss_on: What is learnt of prompts and completions, and of conversations.
        root: Folder of token caches.
        head: What the model wants of text.
        is_apart: Whether it is other data than that which is trained on: then all of a text counts, and any part of a data set will do.
        tests_apart: Whether the test part is given apart, so that all of a text is trained on.
        trained_by: Fingerprint of the tokenizer that the training data's rows were made by; None where it is not known, or this is it.
    """

    tokenizer: str | None
    context: int | None
    packs: bool
    loss_on: Literal["completions", "all"]
    root: Path
    head: Head = Head()
    is_apart: bool = False
    tests_apart: bool = False
    trained_by: str | None = None

    @property
    def keeps_rows(self) -> bool:
        """Whether texts of no token stay: answers to what is predicted are told apart by their numbers alone."""
        return self.is_apart and self.head.may_lack_labels
