"""Language data by name: `jsonl:`, `text:`, `parquet:` and `hfdata:` with a tokenizer, as data sets of token rows."""

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lowmem_pnn.errors import ConfigError
from lowmem_pnn.formats.hub_data import open_parts
from lowmem_pnn.language.documents import Documents, open_jsonl, open_parquet, open_rows, open_texts
from lowmem_pnn.language.packing import Form
from lowmem_pnn.language.token_cache import CacheStats, open_cache
from lowmem_pnn.language.token_rows import INPUT_NAMES, ChosenInputs, TokenRows
from lowmem_pnn.language.tokenizer import Tokenizer, open_tokenizer
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.dataset import Dataset, folder_name
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.sources.targets import PYTORCH_IGNORED, Targets
from lowmem_pnn.sources.text import DEFAULT_CONTEXT

# The last tenth of the windows of a text is its test part, as for bytes.
_TEST_SHARE = 10


@dataclass(frozen=True)
class LanguageForm:
    """How text is to become samples.

    Args:
        tokenizer: `bytes`, a file or a folder; None where nobody says, which is bytes.
        context: Inputs of a row; None for 256.
        packs: Whether documents lie side by side in a row.
        loss_on: What is learnt of prompts and completions, and of conversations.
        root: Folder of token caches.
    """

    tokenizer: str | None
    context: int | None
    packs: bool
    loss_on: Literal["completions", "all"]
    root: Path


def open_language(spec: str, form: LanguageForm) -> Dataset:
    """Open text as token rows.

    Args:
        spec: `jsonl:FILE`, `text:FILE`, `text:DIR`, `parquet:FILE` or `hfdata:NAME`.
        form: How text becomes samples.

    Raises:
        ConfigError: The tokenizer cannot be opened, or does not do.
        DataError: The data is missing, empty or damaged.
    """
    kind, _, place = spec.partition(":")
    tokenizer = open_tokenizer(form.tokenizer or "bytes")
    context = form.context or DEFAULT_CONTEXT
    if kind == "hfdata":
        sources = {
            part: open_rows(rows, f"{spec} ({part} part)" if part != "train" else spec)
            for part, rows in open_parts(place).items()
        }
    else:
        path = Path(place).expanduser()
        sources = {"train": {"jsonl": open_jsonl, "text": open_texts, "parquet": open_parquet}[kind](path)}
    rows_form: Form = "packed" if form.packs else "windows" if kind == "text" else "padded"
    parts: dict[str, TokenRows] = {}
    words, prints = [], []
    for name, documents in sources.items():
        cache = open_cache(
            documents,
            tokenizer,
            form.root,
            context=context,
            form=rows_form,
            on_completions=form.loss_on == "completions",
        )
        prints.append(cache.fingerprint)
        words.append(_words(cache.stats, documents, tokenizer, rows_form, context, form.loss_on))
        parts[name] = TokenRows(cache, context, rows_form, tokenizer.padding, 0, cache.stats.rows)
        if kind == "text" and cache.stats.rows > 1:
            num_test = max(cache.stats.rows // _TEST_SHARE, 1)
            num_train = cache.stats.rows - num_test
            parts["train"] = TokenRows(cache, context, rows_form, tokenizer.padding, 0, num_train)
            parts["test"] = TokenRows(cache, context, rows_form, tokenizer.padding, num_train, num_test)
    names = INPUT_NAMES[rows_form]
    inputs = tuple(TensorSpec((context,), torch.int64) for _ in names)
    return Dataset(
        name=folder_name(Path(place).stem),
        train=parts["train"],
        test=parts.get("test"),
        val=parts.get("val"),
        targets=Targets("tokens", tokenizer.size, (context,), ignored=PYTORCH_IGNORED),
        sample_shape=(context,),
        dtype=torch.int64,
        preprocessing="; ".join(words),
        fingerprint=" ".join(prints),
        inputs=inputs,
        structure=pytree.tree_structure(dict.fromkeys(names, 0)),
        preparation={"tokenizer": form.tokenizer or "bytes", "context": context, "input_names": list(names)},
    )


def fit_inputs(model: nn.Module, spec: str, dataset: Dataset, splits: Mapping[Any, Split]) -> tuple[Dataset, dict[Any, Split]]:
    """Return token rows with the tensors that a model takes: all by name, or the tokens alone where it does not name them.

    Rows are padded at their end, so that a causal model needs no mask; documents in one row are kept apart by their positions alone.

    Args:
        model: The model; only the names of its forward's arguments are read.
        spec: What the model is called in messages.
        dataset: Any data set; others than token rows come back as they are.
        splits: Its parts.

    Raises:
        ConfigError: Documents are packed, and the model takes no positions.
    """
    names: list[str] = list(dataset.preparation.get("input_names", ()))
    if not names:
        return dataset, dict(splits)
    parameters = inspect.signature(model.forward).parameters
    kinds = {one.kind for one in parameters.values()}
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds and ("input_ids" in parameters or len(kinds) == 1)
    taken = names if takes_all else [name for name in names if name in parameters]
    if "position_ids" in names and "position_ids" not in taken:
        raise ConfigError(
            f"--pack keeps documents in a row apart by position_ids, and model {spec} takes none: each would look at those before it; leave "
            "--pack out"
        )
    if "input_ids" in taken and taken == names:
        return dataset, dict(splits)
    as_one = "input_ids" not in taken
    places = (0,) if as_one else tuple(names.index(name) for name in taken)
    chosen: dict[Any, Split] = {name: ChosenInputs(split, places, as_one=as_one) for name, split in splits.items()}
    if as_one:
        return dataclasses.replace(dataset, inputs=(), structure=None), chosen
    inputs = tuple(dataset.inputs[place] for place in places)
    structure = pytree.tree_structure({names[place]: 0 for place in places})
    return dataclasses.replace(dataset, inputs=inputs, structure=structure), chosen


def _words(stats: CacheStats, documents: Documents, tokenizer: Tokenizer, form: Form, context: int, loss_on: str) -> str:
    """Say what became of a source."""
    rows = {
        "windows": f"windows of {context:,} with the token after each as its label",
        "padded": f"a document a row of {context:,}, padded",
        "packed": f"rows of {context:,} of several documents, kept apart by their positions",
    }[form]
    what = "bytes" if tokenizer.name == "bytes" else f"{tokenizer.name} ({tokenizer.size:,} tokens)"
    said = [f"{stats.documents:,} documents, {stats.tokens:,} tokens by {what}", rows]
    if documents.kind != "text":
        learnt = {"completion": "completions", "chat": "what the assistant says"}[documents.kind]
        said.append(f"loss on {'all' if loss_on == 'all' else learnt}")
    said.append(f"{stats.counted:,} labels count")
    for number, text in (
        (stats.split, "longer than a row, and split"),
        (stats.cut, "longer than a row, and cut"),
        (stats.left_out, "without a token to learn, and left out"),
    ):
        if number:
            said.append(f"{number:,} {text}")
    return ", ".join(said)
