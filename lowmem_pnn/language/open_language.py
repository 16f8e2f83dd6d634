"""Language data by name: `jsonl:`, `text:`, `parquet:` and `hfdata:` with a tokenizer, as data sets of token rows."""

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.formats.hub_data import open_parts
from lowmem_pnn.language.documents import Documents, open_jsonl, open_parquet, open_rows, open_texts
from lowmem_pnn.language.language_form import LanguageForm
from lowmem_pnn.language.next_tokens import moves_labels
from lowmem_pnn.language.packing import Form
from lowmem_pnn.language.sequence_rows import LABELLED_NAMES, PAIR_NAMES, LabelledRows, PairRows
from lowmem_pnn.language.token_cache import CacheStats, TokenCache, open_cache
from lowmem_pnn.language.token_rows import INPUT_NAMES, ChosenInputs, TokenRows, left_out_mask
from lowmem_pnn.language.tokenizer import Tokenizer, check_trained_by, open_tokenizer
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.sources.dataset import Dataset, folder_name
from lowmem_pnn.sources.imports import did_you_mean
from lowmem_pnn.sources.splits import Split
from lowmem_pnn.sources.targets import PYTORCH_IGNORED, Targets
from lowmem_pnn.sources.text import DEFAULT_CONTEXT, num_test_rows


def open_language(spec: str, form: LanguageForm) -> Dataset:
    """Open text as token rows.

    Args:
        spec: `jsonl:FILE`, `text:FILE`, `text:DIR`, `parquet:FILE` or `hfdata:NAME`.
        form: How text becomes samples.

    Raises:
        ConfigError: The tokenizer cannot be opened, or does not do.
        DataError: The data is missing, empty or damaged.
    """
    place = spec.partition(":")[2]
    tokenizer = open_tokenizer(form.tokenizer or "bytes")
    check_trained_by(tokenizer.name, tokenizer.fingerprint, form.trained_by)
    form.head.check(tokenizer)
    context, purpose = form.context or DEFAULT_CONTEXT, form.head.purpose
    said: list[str] = []
    sources = _sources(spec, form, said)
    rows_form = _rows_form(spec, form)
    caches = {
        name: open_cache(
            documents,
            tokenizer,
            form.root,
            context=context,
            form=rows_form,
            on_completions=form.loss_on == "completions",
            target_context=form.head.target_context or context if purpose == "sequences" else None,
            filler=_padding(form, tokenizer) if form.keeps_rows and purpose != "next-tokens" else None,
        )
        for name, documents in sources.items()
    }
    words = [_words(cache.stats, sources[name], tokenizer, rows_form, form) for name, cache in caches.items()]
    preparation: dict[str, Any] = {
        "tokenizer": form.tokenizer or "bytes",
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "context": context,
    }
    if sources["train"].kind == "chat":
        preparation["documents"] = "chat"
    classes: tuple[str, ...] = ()
    parts: dict[str, Split]
    is_whole = purpose == "next-tokens" and spec.startswith("text:") and (form.is_apart or form.tests_apart)
    if purpose == "classes":
        classes, parts, targets = _labelled(spec, form, sources, caches, tokenizer)
        preparation |= {"target": sources["train"].label, "classes": list(classes)}
    elif purpose == "sequences":
        parts, targets = _pairs(form, caches, tokenizer)
    else:
        parts = _next_tokens(spec, caches, context, rows_form, tokenizer, is_whole=is_whole)
        targets = Targets("tokens", tokenizer.size, (context,), ignored=PYTORCH_IGNORED)
    names = _INPUTS[rows_form]
    inputs = tuple(TensorSpec((context,), torch.int64) for _ in names)
    if purpose == "sequences":
        inputs = (*inputs[:-1], TensorSpec(targets.shape, torch.int64))
    return Dataset(
        name=folder_name(Path(place).stem),
        train=parts["train"],
        test=parts.get("test"),
        val=parts.get("val"),
        targets=targets,
        sample_shape=(context,),
        dtype=torch.int64,
        preprocessing="; ".join([*words, *said]),
        fingerprint=" ".join([cache.fingerprint for cache in caches.values()] + (["whole"] if is_whole else [])),
        classes=classes,
        inputs=inputs,
        structure=pytree.tree_structure(dict.fromkeys(names, 0)),
        preparation=preparation | {"input_names": list(names)},
    )


# Columns that are named at most.
_MOST_NAMED = 6
_INPUTS: dict[Form, tuple[str, ...]] = {**INPUT_NAMES, "labelled": LABELLED_NAMES, "pairs": PAIR_NAMES}


def _sources(spec: str, form: LanguageForm, said: list[str]) -> dict[str, Documents]:
    """Return the documents of each part; what is to be said of them is added to a list."""
    kind, _, place = spec.partition(":")
    wanted = form.head.wanted
    if kind == "hfdata":
        parts = open_parts(place, needs_train=not form.is_apart)
        if "train" not in parts and len(parts) > 1:
            raise DataError(f"{spec} has the parts {', '.join(map(repr, parts))}, and no training part; give one of them alone")
        if "train" not in parts:
            parts = {"train": next(iter(parts.values()))}
        parts = _without_hidden(parts, form, said)
        return {
            part: open_rows(rows, f"{spec} ({part} part)" if part != "train" else spec, wanted) for part, rows in parts.items()
        }
    path = Path(place).expanduser()
    if kind == "text":
        if form.head.purpose != "next-tokens":
            raise ConfigError(f"data {spec} is text alone, and the model learns from {wanted.words}; give jsonl:FILE with these")
        return {"train": open_texts(path)}
    return {"train": (open_jsonl if kind == "jsonl" else open_parquet)(path, wanted)}


def _without_hidden(parts: dict[str, Any], form: LanguageForm, said: list[str]) -> dict[str, Any]:
    """Return the parts of a data set without labels that are hidden, as GLUE's test parts have them: each is -1."""
    column, shown = form.head.label, dict(parts)
    for part, rows in parts.items():
        if form.head.purpose != "classes" or column not in rows.features or not len(rows):
            continue
        if any(value != -1 for value in rows[column]):
            continue
        if form.head.may_lack_labels:
            shown[part] = rows.remove_columns(column)
        elif part != "train":
            said.append(f"the {part} part is left out: its labels are hidden (-1)")
            del shown[part]
    return shown


def _rows_form(spec: str, form: LanguageForm) -> Form:
    """Return how rows are filled, where the options for rows fit what is learnt."""
    if form.head.purpose == "next-tokens":
        return "packed" if form.packs else "windows" if spec.startswith("text:") else "padded"
    given = {"--pack": form.packs, "--loss-on all": form.loss_on == "all"}
    if wrong := [flag for flag, is_given in given.items() if is_given]:
        what = "the class of a text" if form.head.purpose == "classes" else "targets alone"
        raise ConfigError(f"{wrong[0]} has no effect here: what is learnt of data {spec} is {what}; leave it out")
    return "labelled" if form.head.purpose == "classes" else "pairs"


def _next_tokens(
    spec: str, caches: Mapping[str, TokenCache], context: int, rows_form: Form, tokenizer: Tokenizer, *, is_whole: bool
) -> dict[str, Split]:
    """Return the parts of text that a model goes on with."""
    parts: dict[str, Split] = {}
    for name, cache in caches.items():
        rows = cache.stats.rows
        num_test = num_test_rows(rows) if spec.startswith("text:") and not is_whole else 0
        parts[name] = TokenRows(cache, context, rows_form, tokenizer.padding, 0, rows - num_test)
        if num_test:
            parts["test"] = TokenRows(cache, context, rows_form, tokenizer.padding, rows - num_test, num_test)
    return parts


def _pairs(form: LanguageForm, caches: Mapping[str, TokenCache], tokenizer: Tokenizer) -> tuple[dict[str, Split], Targets]:
    """Return the parts of sources and targets, and the form of the targets."""
    context = form.context or DEFAULT_CONTEXT
    length, padding = form.head.target_context or context, _padding(form, tokenizer)
    start = form.head.start if form.head.start is not None else padding
    parts: dict[str, Split] = {name: PairRows(cache, context, length, padding, start) for name, cache in caches.items()}
    return parts, Targets("tokens", tokenizer.size, (length,), ignored=PYTORCH_IGNORED)


def _labelled(
    spec: str, form: LanguageForm, sources: Mapping[str, Documents], caches: Mapping[str, TokenCache], tokenizer: Tokenizer
) -> tuple[tuple[str, ...], dict[str, Split], Targets]:
    """Return the names of the classes, the parts of texts with classes, and the form of the targets."""
    context, padding = form.context or DEFAULT_CONTEXT, _padding(form, tokenizer)
    known, column = form.head.classes or sources["train"].classes, form.head.label
    # A source that names its classes numbers them as it likes.
    labels = {name: [_name_of(label, sources[name], column) for label in cache.found_labels] for name, cache in caches.items()}
    found = {label for own in labels.values() for label in own}
    named = [label for label in found if isinstance(label, str)]
    if named and len(named) < len(found):
        raise DataError(f"{spec}: {column!r} holds names and numbers of classes; give one of the two")
    numbers: dict[str | int, int] = {}
    if named:
        known = known or tuple(sorted(named))
        numbers = {label: number for number, label in enumerate(known)}
        if unknown := sorted(set(named) - set(known)):
            raise DataError(
                f"{spec} has the class {unknown[0]!r}, which the training data has not{did_you_mean(unknown[0], list(known))}; give both "
                "the same names of classes"
            )
    else:
        numbers = {label: int(label) for label in found}
    most = max(numbers.values(), default=0) + 1
    if known and most > len(known):
        raise DataError(f"{spec}: {column!r} holds class {most - 1}, and there are {len(known)} classes, from 0; mend it")
    parts: dict[str, Split] = {
        name: LabelledRows(cache, context, padding, [numbers[label] for label in labels[name]]) for name, cache in caches.items()
    }
    return known, parts, Targets("class", len(known) or most)


def _name_of(label: str | int, documents: Documents, column: str) -> str | int:
    """Return the name of a class where its source has names for numbers, else what the source has."""
    if isinstance(label, str) or not documents.classes:
        return label
    if label >= len(documents.classes):
        raise DataError(
            f"{documents.name}: {column!r} holds class {label}, and there are {len(documents.classes)} classes, from 0; mend it"
        )
    return documents.classes[label]


def _padding(form: LanguageForm, tokenizer: Tokenizer) -> int:
    return tokenizer.padding if form.head.padding is None else form.head.padding


def fit_inputs(model: nn.Module, spec: str, dataset: Dataset, splits: Mapping[Any, Split]) -> tuple[Dataset, dict[Any, Split]]:
    """Return token rows with the tensors that a model takes: all by name, or the tokens alone where it does not name them.

    Rows are padded at their end, so that a causal model needs no mask; documents in one row are kept apart by their positions alone.

    Args:
        model: The model; only the names of its forward's arguments are read.
        spec: What the model is called in messages.
        dataset: Any data set; others than token rows come back as they are, but for masks that a causal model of transformers does not take.
        splits: Its parts.

    Raises:
        ConfigError: Documents are packed, and the model takes no positions.
    """
    names: list[str] = list(dataset.preparation.get("input_names", ())) or _names_with_mask(model, dataset)
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
    mask = left_out_mask({name: place for place, name in enumerate(names)}, taken)
    chosen: dict[Any, Split] = {name: ChosenInputs(split, places, as_one=as_one, mask=mask) for name, split in splits.items()}
    if as_one:
        return dataclasses.replace(dataset, inputs=(), structure=None), chosen
    inputs = tuple(dataset.inputs[place] for place in places)
    structure = pytree.tree_structure({names[place]: 0 for place in places})
    return dataclasses.replace(dataset, inputs=inputs, structure=structure), chosen


def _names_with_mask(model: nn.Module, dataset: Dataset) -> list[str]:
    """Return what rows from Python call their tensors, where a causal model of transformers takes all of them but the mask; else none."""
    named = None if dataset.structure is None else dataset.structure.unflatten([*range(dataset.structure.num_leaves)])
    if not isinstance(named, dict) or "attention_mask" not in named or not moves_labels(model):
        return []
    parameters = inspect.signature(model.forward).parameters
    left_out = [name for name in named if name not in parameters]
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return [] if takes_all or left_out != ["attention_mask"] else sorted(named, key=named.__getitem__)


def _words(stats: CacheStats, documents: Documents, tokenizer: Tokenizer, rows_form: Form, form: LanguageForm) -> str:
    """Say what became of a source."""
    context = form.context or DEFAULT_CONTEXT
    rows = {
        "windows": f"windows of {context:,} with the token after each as its label",
        "padded": f"a document a row of {context:,}, padded",
        "packed": f"rows of {context:,} of several documents, kept apart by their positions",
        "labelled": f"a text a row of {context:,}, padded, with its class",
        "pairs": f"a source a row of {context:,}, its target one of {form.head.target_context or context:,}, padded",
    }[rows_form]
    what = "bytes" if tokenizer.name == "bytes" else f"{tokenizer.name} ({tokenizer.size:,} tokens)"
    said = [f"{stats.documents:,} documents, {stats.tokens:,} tokens by {what}", rows]
    if rows_form == "padded" or (rows_form == "packed" and documents.kind != "text"):
        learnt = {"completion": "completions", "chat": "what the assistant says"}.get(documents.kind)
        said += [] if learnt is None else [f"loss on {'all' if form.loss_on == 'all' else learnt}"]
    said.append(f"{stats.counted:,} labels count")
    for number, text in (
        (stats.split, "longer than a row, and split"),
        (stats.cut, "longer than a row, and cut"),
        (stats.left_out, "without a token to learn, and left out"),
        (stats.filled, "without a token, and read as one of padding"),
        (stats.wrapped, "with the tokens of a begin or an end of their own, which are not put twice"),
    ):
        if number:
            said.append(f"{number:,} {text}")
    if documents.unread:
        more = len(documents.unread) - _MOST_NAMED
        said.append(f"columns not read: {' '.join(documents.unread[:_MOST_NAMED])}{f' and {more} others' if more > 0 else ''}")
    return ", ".join(said)
