"""Sources of a run's data, opened as its options say: by name, or data frames from Python."""

import atexit
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowmem_pnn.config.fit_config import FitConfig, default_of
from lowmem_pnn.config.language_options import ROWS_OF_TEXT
from lowmem_pnn.errors import ConfigError, DataError
from lowmem_pnn.formats.data_frame import as_frame
from lowmem_pnn.formats.hub_data import open_hub_data
from lowmem_pnn.formats.mask_folder import open_mask_folder
from lowmem_pnn.formats.table_file import TableFile
from lowmem_pnn.formats.tables import TableSchema, open_table
from lowmem_pnn.language.language_form import Head, LanguageForm, Purpose
from lowmem_pnn.language.open_language import open_language
from lowmem_pnn.language.token_file import open_token_file
from lowmem_pnn.sources.dataset import Dataset
from lowmem_pnn.sources.datasets import find_dataset
from lowmem_pnn.sources.preprocessing import InputForm
from lowmem_pnn.sources.resize import Resize
from lowmem_pnn.sources.subsets import RenumberedSplit
from lowmem_pnn.sources.targets import TargetOptions
from lowmem_pnn.sources.text import DEFAULT_CONTEXT
from lowmem_pnn.zoo.model_source import ModelSource, TransformersFacts

# What models of transformers learn of text, where that is not the token that comes next.
_PURPOSES: dict[str, Purpose] = {"sequence-classification": "classes", "seq2seq": "sequences"}
# Types of configurations whose tokenizers put a token for the language before or behind each text.
_OF_SEVERAL_LANGUAGES = ("m2m_100", "mbart", "nllb-moe", "plbart", "seamless_m4t", "seamless_m4t_v2")


def resize_of(config: FitConfig) -> Resize | None:
    """Return what brings images to the size that is asked for; None where they keep their own."""
    return None if config.image_shape is None else Resize(*config.image_shape, config.resize)


@dataclasses.dataclass(frozen=True)
class SampleForm:
    """What model and task say of samples before they are opened.

    Args:
        input_form: form of the samples that the model takes.
        context: tokens of a sample of text, which is the model's context; None where it does not say.
        options: what is known of the targets.
        tokenizer: tokenizer that belongs to the model; None where there is none.
        head: what the model wants of text; None where it does not say.
        may_lack_labels: whether texts without the classes that the model predicts will do.
        classes: names of the classes that the model's head gives scores for, by their numbers; empty where it does not say.
    """

    input_form: InputForm
    context: int | None
    options: TargetOptions
    tokenizer: str | None = None
    head: Head | None = None
    may_lack_labels: bool = False
    classes: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: ModelSource | None, options: TargetOptions, *, may_lack_labels: bool = False) -> "SampleForm":
        """Return what a model says of its samples.

        Args:
            source: the model; None for one that was given from Python.
            options: what is known of the targets.
            may_lack_labels: whether texts without the classes that the model predicts will do.
        """
        if source is None:
            return cls("any", None, options)
        context, facts = source.context, source.transformers
        if facts is None:
            return cls(source.input_form, context, options, source.tokenizer, may_lack_labels=may_lack_labels)
        head = _head_of(source, facts)
        if head.purpose != "next-tokens":
            context = min(DEFAULT_CONTEXT, source.most_context or DEFAULT_CONTEXT)
        names = getattr(facts.config, "id2label", None) if facts.task.endswith("classification") else None
        classes = tuple(str(names[number]) for number in sorted(names)) if isinstance(names, dict) else ()
        return cls(source.input_form, context, options, source.tokenizer, head, may_lack_labels, classes)


def _head_of(source: ModelSource, facts: TransformersFacts) -> Head:
    """Return what a model of transformers wants of text."""
    text = facts.config.get_text_config()
    purpose = _PURPOSES.get(facts.task, "next-tokens")
    head = Head(purpose, model=source.spec, vocabulary=getattr(text, "vocab_size", None))
    if purpose == "next-tokens":
        return head
    return dataclasses.replace(
        head,
        padding=getattr(text, "pad_token_id", None),
        start=getattr(facts.config, "decoder_start_token_id", None),
        # Of a configuration inside of another one no argument changes a value.
        looks_for_padding=purpose == "classes" and text is facts.config,
        marks_languages=facts.config.model_type in _OF_SEVERAL_LANGUAGES,
    )


def open_source(
    spec: str, config: FitConfig, form: SampleForm, preparation: Mapping[str, Any] | None = None, *, tests_apart: bool = False
) -> Dataset:
    """Open a data set by name, as a run's options say.

    Args:
        spec: name of the data set.
        config: options of the run.
        form: what is known of its samples.
        preparation: what the training data's samples were made with (`Dataset.preparation`), for other data of the same kind; None for
            the training data.
        tests_apart: whether the training data's test part is given apart, from Python; `--test-data` says so itself.
    """
    dataset = _open(spec, config, form, preparation, tests_apart or config.test_data is not None)
    return _numbered_like(dataset, form.classes)


def _open(spec: str, config: FitConfig, form: SampleForm, preparation: Mapping[str, Any] | None, tests_apart: bool) -> Dataset:
    kind, _, path = spec.partition(":")
    if kind in ("csv", "parquet", "segmentation", "hfdata", "jsonl", "tokens") and not path:
        raise ConfigError(
            f"data set {spec!r} says no place; write {kind}:{'DIR' if kind in ('segmentation', 'hfdata') else 'FILE'}"
        )
    if (dataset := _open_text(spec, config, form, preparation, tests_apart)) is not None:
        return dataset
    if kind in ROWS_OF_TEXT and preparation is None:
        given = {"--pack": config.pack, "--context": config.context, "--loss-on": config.loss_on != default_of("loss_on")}
        if wrong := [name for name, value in given.items() if value]:
            raise ConfigError(
                f"{wrong[0]} has no effect here: data {spec!r} is text only with a --tokenizer; give one, or leave {wrong[0]} out"
            )
    if kind == "hfdata":
        return open_hub_data(
            path, config.target, form.input_form, form.options, skip_broken=config.skip_broken, resize=resize_of(config)
        )
    if kind == "segmentation":
        return open_mask_folder(
            Path(path).expanduser(), form.input_form, form.options, skip_broken=config.skip_broken, resize=resize_of(config)
        )
    if kind in ("csv", "parquet"):
        if config.image_size is not None:
            raise ConfigError(f"--image-size has no effect here: data {spec!r} is a table; leave it out")
        if preparation is not None and "columns" not in preparation:
            raise DataError(f"data {spec} is a table, and the training data {config.data} is none; give data of one kind")
        return open_table(
            TableFile(Path(path).expanduser(), kind),  # type: ignore[arg-type]
            config.target,
            form.input_form,
            form.options,
            skip_broken=config.skip_broken,
            schema=None if preparation is None else TableSchema.from_dict(preparation),
        )
    return find_dataset(
        spec,
        config.data_root,
        form.input_form,
        context=config.context or form.context,
        whole_text=preparation is not None or tests_apart,
        skip_broken=config.skip_broken,
        options=form.options,
        resize=resize_of(config),
    )


def _numbered_like(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Return data whose classes have the numbers that a model's head gives scores for, where both have the same names for them.

    Data sets number classes by the alphabet; a head that was trained on the same classes would have to learn other numbers for them.
    """
    number_of = {name.casefold(): number for number, name in enumerate(names)}
    own = [name.casefold() for name in dataset.classes]
    if len(number_of) != len(names) or len(own) != len(names) or {*own} != {*number_of} or dataset.targets.kind != "class":
        return dataset
    numbers = [number_of[name] for name in own]
    if numbers == sorted(numbers):
        return dataset
    parts = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    tensor = torch.tensor(numbers)
    renumbered: dict[str, Any] = {name: None if part is None else RenumberedSplit(part, tensor) for name, part in parts.items()}
    classes = tuple(dataset.classes[numbers.index(number)] for number in range(len(numbers)))
    preparation = dict(dataset.preparation)
    if "classes" in preparation:
        preparation["classes"] = list(classes)
    prints = hashlib.sha256(f"{dataset.fingerprint}{numbers}".encode()).hexdigest()
    return dataclasses.replace(dataset, **renumbered, classes=classes, preparation=preparation, fingerprint=prints)


def open_frame(
    data: Any, config: FitConfig, form: SampleForm, name: str, preparation: Mapping[str, Any] | None = None
) -> Dataset | None:
    """Open a data frame from Python, or a pair of one and its targets, as a table.

    Args:
        data: what was given.
        config: options of the run.
        form: what is known of its samples.
        name: name of the data in messages.
        preparation: what the training data's samples were made with; None for the training data.

    Returns:
        The data set; None where the data is no table: neither frame nor words, or not of a table's run.

    Raises:
        ConfigError: it is not said which column is to be predicted, or there is no such column.
        DataError: a value cannot be used.
    """
    if preparation is not None and "columns" not in preparation:
        return None
    schema = None if preparation is None else TableSchema.from_dict(preparation)
    frame = as_frame(data, name, None if schema is None else schema.targets)
    if frame is None:
        return None
    return open_table(frame, config.target, form.input_form, form.options, skip_broken=config.skip_broken, schema=schema)


def _open_text(
    spec: str, config: FitConfig, form: SampleForm, preparation: Mapping[str, Any] | None, tests_apart: bool
) -> Dataset | None:
    """Open text that becomes tokens by a tokenizer, or tokens in a file; None where the data is something else, or bytes of one file."""
    kind, _, place = spec.partition(":")
    tokenizer = config.tokenizer or form.tokenizer
    context = config.context or form.context
    is_text = kind == "jsonl" or (kind in ROWS_OF_TEXT and tokenizer is not None)
    if kind == "text" and place:
        is_text = tokenizer not in (None, "bytes") or config.pack or Path(place).expanduser().is_dir()
    if not is_text and kind != "tokens":
        return None
    if form.input_form != "any":
        what = "images" if form.input_form == "image3" else "flat vectors"
        raise ConfigError(
            f"data set {spec!r} holds tokens, and the model takes {what}; give a model of tokens, such as --model gpt:layers=2,width=64,heads=2"
        )
    head = form.head or Head()
    may_have_classes = kind != "tokens" and (form.head is None or head.purpose == "classes")
    if config.target is not None and may_have_classes:
        if len(config.target) > 1:
            raise ConfigError(f"data {spec}: --target {','.join(config.target)} names several columns; give one")
        head = dataclasses.replace(head, purpose="classes", label=config.target[0])
    given = {
        "--image-size": config.image_size,
        "--target": None if may_have_classes else config.target,
        "--target-context": None if head.purpose == "sequences" else config.target_context,
        "--skip-broken": config.skip_broken or None,
    }
    if wrong := [name for name, value in given.items() if value is not None]:
        raise ConfigError(f"{wrong[0]} has no effect here: data {spec!r} is text; leave it out")
    if kind == "tokens":
        if head.purpose != "next-tokens":
            raise ConfigError(
                f"data {spec!r} is tokens alone, and the model learns from {head.wanted.words}; give jsonl:FILE with these"
            )
        return open_token_file(place, context, tokenizer)
    known, is_apart = preparation or {}, preparation is not None
    head = dataclasses.replace(
        head,
        classes=tuple(known.get("classes", ())),
        may_lack_labels=form.may_lack_labels,
        target_context=config.target_context,
    )
    language_form = LanguageForm(
        tokenizer,
        context,
        config.pack,
        config.loss_on,
        _token_root(config, is_apart=is_apart),
        head,
        is_apart=is_apart,
        tests_apart=tests_apart,
        trained_by=known.get("tokenizer_fingerprint"),
    )
    return open_language(spec, language_form)


def _token_root(config: FitConfig, *, is_apart: bool) -> Path:
    """Return the folder of token caches.

    Where other data than the training's is opened, it may be on another machine, which has no such folder: then it is a temporary one.
    """
    root = config.data_root / "tokens"
    if not is_apart:
        return root
    try:
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK):
            return root
    except OSError:
        pass
    folder = tempfile.mkdtemp(prefix="lowmem-pnn-tokens-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
