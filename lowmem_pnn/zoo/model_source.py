"""The source of a model: its constructor, what it takes, and what it begins with; whoever names the model makes one."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem_pnn.config.transformers_place import TOKENIZER_FILES
from lowmem_pnn.sources.image_stats import ImageStats
from lowmem_pnn.sources.preprocessing import InputForm
from lowmem_pnn.zoo.library_models import PretrainedValues
from lowmem_pnn.zoo.ready_model import ready

# What of a model's folder belongs to the preparation of images, and to generation.
_OTHERS = ("generation_config.json", "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.txt", "NOTICE")


@dataclass(frozen=True)
class TransformersFacts:
    """What is known of a model of transformers beside its constructor.

    Args:
        config: Its configuration, of transformers.
        architecture: Class that it is of.
        folder: Folder with its tokenizer and generation config; None for a configuration alone.
        task: Task that its head is for, as `--task` has it.
        has_new_head: Whether the weights are of another architecture, so that what it adds has random values.
        uses_cache: Whether its configuration has it generate with a cache, which training has no use for.
        text_uses_cache: The same of the configuration for text in it, where it has one.
    """

    config: Any
    architecture: str
    folder: Path | None
    task: str
    has_new_head: bool
    uses_cache: bool
    text_uses_cache: bool = True


@dataclass(frozen=True)
class ModelSource:
    """Source of a model: its constructor, to be called as often as needed.

    Args:
        name: Name for run folders: letters, digits, '-', '_' and '.' only.
        spec: Text by which the user named the model.
        build: Calls the constructor; the weights are random, from torch's global generator, which is not seeded by it.
        input_form: Form of the samples that the model takes.
        context: Number of tokens of a sample of text; None where the model does not say.
        default_weights: Fetches the file of the model's own pretrained weights; None where it has none.
        image_stats: How images were prepared that the pretrained weights are from; None where weights are random, or nobody knows.
        weights: Pretrained weights that training begins with; None for the constructor's values.
        tokenizer: Tokenizer that belongs to the model, as `--tokenizer` takes it; None where there is none.
        most_context: Most tokens of a sample that the model has positions for; None for any number, or for `context`.
        notes: What is to be said of the model, a line each.
        transformers: What is known of a model of transformers; None for any other.
        give_values: Gives a model that was built on the meta device memory, and the constructor's values to all but some tensors; None
            where the constructor has to run for that.
        is_prepared: Whether it builds the model that is trained, to which no options are applied any more.
    """

    name: str
    spec: str
    build: Callable[[], nn.Module]
    input_form: InputForm
    context: int | None = None
    default_weights: Callable[[], Path] | None = None
    image_stats: ImageStats | None = None
    weights: PretrainedValues | None = None
    tokenizer: str | None = None
    most_context: int | None = None
    notes: tuple[str, ...] = ()
    transformers: TransformersFacts | None = None
    give_values: Callable[[nn.Module, Collection[str]], None] | None = None
    is_prepared: bool = False

    def __post_init__(self) -> None:
        """Have models made ready as soon as they are built."""
        object.__setattr__(self, "build", _Ready.of(self.build))

    def copied_files(self, tokenizer: str | None) -> dict[str, Path]:
        """Return the files that go into a folder for transformers as they are, by their names there.

        Args:
            tokenizer: What `--tokenizer` says; None for the model's own.
        """
        if self.transformers is None:
            return {}
        # What lies beside a configuration alone is not the model's.
        own = None if self.spec.endswith(".json") else self.transformers.folder
        found = {} if own is None else {name: own / name for name in _OTHERS}
        return {name: file for name, file in found.items() if file.is_file()} | self.tokenizer_files(tokenizer)

    def tokenizer_files(self, tokenizer: str | None) -> dict[str, Path]:
        """Return those of these files that belong to the tokenizer.

        Args:
            tokenizer: As for `copied_files`.
        """
        place = tokenizer or self.tokenizer
        if self.transformers is None or place is None or place == "bytes":
            return {}
        file = Path(place)
        # As `open_tokenizer` reads what lies beside it.
        folder = file if file.is_dir() else file.parent if file.name == "tokenizer.json" else None
        found = {"tokenizer.json": file} if folder is None else {name: folder / name for name in TOKENIZER_FILES}
        return {name: file for name, file in found.items() if file.is_file()}

    def copied_bytes(self, tokenizer: str | None) -> int:
        """Return the bytes of these files.

        Args:
            tokenizer: As for `copied_files`.
        """
        return sum(file.stat().st_size for file in self.copied_files(tokenizer).values())

    def build_but(self, given: Collection[str]) -> nn.Module:
        """Build the model, without values that are replaced: these tensors may be zeros.

        Args:
            given: Names of the tensors that get their values later.
        """
        if self.give_values is None or not given:
            return self.build()
        with torch.device("meta"):
            model = self.build()
        self.give_values(model, given)
        return model


@dataclass(frozen=True)
class _Ready:
    """A constructor whose models are made ready."""

    build: Callable[[], nn.Module]

    @classmethod
    def of(cls, build: Callable[[], nn.Module]) -> "_Ready":
        """Return the constructor, which may be such a one already."""
        return build if isinstance(build, _Ready) else cls(build)

    def __call__(self) -> nn.Module:
        model = self.build()
        return ready(model) if isinstance(model, nn.Module) else model


def folder_name(text: str) -> str:
    """Make a short text that is safe as part of a folder's name.

    Args:
        text: Any text.

    Example:
        >>> folder_name("my models/net.py")
        'my-models-net.py'
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
    return name if len(name) <= 60 else name[:60].rstrip("-.")


def too_many_tokens(model: str, known: int, tokens: int) -> str:
    """Return what to say of a tokenizer that has more tokens than a model knows.

    Args:
        model: What the model is called.
        known: Tokens that it knows.
        tokens: Tokens that the tokenizer has.
    """
    return (
        f"model {model} knows {known:,} tokens, and the tokenizer of the data has {tokens:,}; give the model's own (--tokenizer DIR), or, where "
        f"that is it, the model with as many: model.resize_token_embeddings({tokens})"
    )
