"""A trained model of transformers as a folder that `from_pretrained` loads: written beside its place, and renamed when all is there."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowmem_pnn import __version__
from lowmem_pnn.adapters.prepared_model import adapter_modules
from lowmem_pnn.config.defaults import training_words
from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.exporting.image_processor import PROCESSOR_FILES, image_processor, keeps_processor
from lowmem_pnn.quantization.stored_weights import stored_parts
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.sources.dataset import Dataset
from lowmem_pnn.stores.disk import disk_error, remove_folder, sync_file, sync_folder
from lowmem_pnn.stores.header import TensorEntry
from lowmem_pnn.stores.journal import DAMAGED
from lowmem_pnn.stores.run_creation import TRANSFORMERS_FOLDER
from lowmem_pnn.stores.tensor_file import TensorFile
from lowmem_pnn.units import format_bytes
from lowmem_pnn.workload import Workload
from lowmem_pnn.zoo.model_source import ModelSource
from lowmem_pnn.zoo.transformers_models import config_json

SHARD_BYTES = 5_000_000_000
"""Most bytes of a file of weights in a folder of its own, as on the hub."""


def holds_a_model(workload: Workload) -> bool:
    """Decide whether a run leaves a folder for transformers: not where its weights are not those of the model alone, but adapters too.

    Args:
        workload: Model, data and method of the run.
    """
    chain = workload.bare
    return workload.source.transformers is not None and not adapter_modules(chain.modules()) and not stored_parts(chain.modules())


def write_folder(
    folder: Path, weights: Path, source: ModelSource, config: FitConfig, result: Result, dataset: Dataset, *, links: bool
) -> None:
    """Write a folder that `from_pretrained` loads, in the place of one that is there.

    Args:
        folder: The folder.
        weights: Safetensors file with the names of the model's `state_dict`.
        source: Model of transformers.
        config: Options of the run.
        result: What it came to.
        dataset: Its data, of which the kind of the targets and the names of the classes are told.
        links: Whether the file of weights may be linked, so that it is stored once; else it is written in shards of `SHARD_BYTES`.

    Raises:
        DiskError: The disk is full, or not writable; what was in the folder's place is there still.
    """
    temporary: Path | None = None
    try:
        # By its name a run knows what a kill leaves of it.
        temporary = Path(tempfile.mkdtemp(prefix="scratch." if links else f".{folder.name}.", dir=folder.parent))
        temporary.chmod(folder.parent.stat().st_mode & 0o777)  # not for its owner alone, as temporary folders are
        (temporary / "config.json").write_text(config_json(source, dataset.classes, dataset.targets.kind))
        copied = source.copied_files(config.tokenizer)
        is_told = keeps_processor(source, config, result)
        if not is_told:
            copied = {name: file for name, file in copied.items() if name not in PROCESSOR_FILES}
            if is_told := (settings := image_processor(config, result)) is not None:
                (temporary / PROCESSOR_FILES[0]).write_text(json.dumps(settings, indent=2) + "\n")
        for name, file in copied.items():
            shutil.copyfile(file, temporary / name)
        card = _card(source, config, result, is_told=is_told)
        (temporary / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        if not links or not _link(weights, temporary / "model.safetensors"):
            _write_shards(weights, temporary)
        for file in temporary.iterdir():
            with file.open("rb") as stream:
                sync_file(file, stream.fileno())
        sync_folder(temporary)
        if os.path.lexists(folder):
            folder.unlink() if folder.is_symlink() or folder.is_file() else remove_folder(folder)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise disk_error(folder, error, "write it") from error
    finally:
        if temporary is not None and temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)


def export_to_transformers(workload: Workload, config: FitConfig, result: Result, run: Path, out: Path | None) -> dict[str, Any]:
    """Write the model of a finished run as a folder for transformers.

    Args:
        workload: Model of the run.
        config: Options of the run.
        result: What it came to.
        run: Folder of the run.
        out: Folder for the files; None for the run's own, whose weights are a second name of the run's.

    Returns:
        `file`, the file of weights or its index, and `largest_difference`, which is 0: the bytes are copied.

    Raises:
        ConfigError: The model is none of transformers, its weights are not those of the model alone, or something is in the way.
        DiskError: The disk is full, or not writable.
    """
    if workload.source.transformers is None:
        raise ConfigError(f"--to hf: model {workload.source.spec} is none of transformers (hf:DIR); give --to safetensors")
    if not holds_a_model(workload):
        raise ConfigError(
            f"--to hf: the weights of {run} are kept in smaller types, or with adapters beside them, which a folder for transformers does not "
            "hold; give --merge"
        )
    folder = _place(run, out)
    write_folder(folder, run / "model.safetensors", workload.source, config, result, workload.dataset, links=out is None)
    index = folder / "model.safetensors.index.json"
    return {"file": str(index if index.exists() else folder / "model.safetensors"), "largest_difference": 0.0}


def _place(run: Path, out: Path | None) -> Path:
    """Return the folder that an export may write to.

    Args:
        run: Folder of the run.
        out: Folder that was asked for; None for the run's own.

    Raises:
        ConfigError: Something is there already, which is not replaced.
        DiskError: The folder above it cannot be made.
    """
    if out is None:
        return run / TRANSFORMERS_FOLDER
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"--out {out} is there, and nothing is replaced; give another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(out, error, "make it") from error
    return out


def _link(file: Path, link: Path) -> bool:
    """Give a file a second name; return False where the file system has no such thing."""
    try:
        os.link(file, link)
    except OSError:
        return False
    return True


def _write_shards(weights: Path, folder: Path) -> None:
    """Write a file of weights into one file, or several with an index, a tensor at a time."""
    with TensorFile.open(weights, remedy=DAMAGED) as whole:
        shards = list(_divided(list(whole.entries.values())))
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        for name, entries in zip(names, shards, strict=True):
            layout = {entry.name: (entry.dtype, entry.shape) for entry in entries}
            with TensorFile.create(folder / name, layout, {"format": "pt"}, keep_order=True) as file:
                for entry in entries:
                    file.copy_from(entry.name, whole, entry.name)
        if len(shards) > 1:
            total = sum(entry.nbytes for entry in whole.entries.values())
            homes = {entry.name: name for name, entries in zip(names, shards, strict=True) for entry in entries}
            index = {"metadata": {"total_size": total}, "weight_map": homes}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _divided(entries: Sequence[TensorEntry]) -> Iterator[list[TensorEntry]]:
    shard: list[TensorEntry] = []
    nbytes = 0
    for entry in entries:
        if shard and nbytes + entry.nbytes > SHARD_BYTES:
            yield shard
            shard = []
            nbytes = 0
        shard.append(entry)
        nbytes += entry.nbytes
    yield shard


def _card(source: ModelSource, config: FitConfig, result: Result, *, is_told: bool) -> str:
    """Return a model card: what was trained on what, and how. It names no folder's place, which is nobody's business elsewhere.

    Args:
        source: Model of transformers.
        config: Options of the run.
        result: What it came to.
        is_told: Whether the folder tells how images are prepared, where it is a model of images.
    """
    facts = source.transformers
    assert facts is not None
    base = source.spec.removeprefix("hf:")
    # A folder is named by its whole path.
    is_hub = facts.folder is not None and not Path(base).is_absolute()
    name = base.partition("@")[0] if is_hub else Path(base).name
    front = {"library_name": "transformers", "pipeline_tag": _PIPELINES[facts.task], **({"base_model": name} if is_hub else {})}
    began = result.weights.get("loaded") is not None if result.weights else False
    scores = [
        f"{words} {value:.4f}"
        for words, value in (
            ("training loss", result.train_loss),
            ("validation loss", result.val_loss),
            ("test loss", result.test_loss),
            ("test perplexity", result.perplexity),
            ("test accuracy", result.test_accuracy),
        )
        if value is not None
    ]
    lines = [
        *("---", *(f"{key}: {value}" for key, value in front.items()), "tags: [lowmem-pnn]", "---", ""),
        f"# {name}, {'fine-tuned' if began else 'trained from random values'}",
        "",
        f"{facts.task}, trained by lowmem-pnn {__version__} within {format_bytes(result.budget_bytes)} of memory on one device "
        f"({result.device}); peak {format_bytes(result.peak_bytes)}.",
        "",
        f"- Data: {config.data.partition(':')[0]}:{Path(config.data.partition(':')[2]).name}; {result.data_parts}"
        if ":" in config.data
        else f"- Data: {config.data}; {result.data_parts}",
        f"- Training: {training_words(config)}; batches of {'auto' if config.batch_size == 'auto' else config.batch_size[0]}, seed "
        f"{config.seed}, precision {config.precision}",
        *([f"- Context: {result.preparation['context']} tokens"] if "context" in result.preparation else []),
        *([f"- Scores: {', '.join(scores)}"] if scores else []),
        *(["- Text was trained on as bytes: there is no tokenizer in this folder"] if config.tokenizer == "bytes" else []),
        *_image_words(source, result, is_told=is_told),
        "",
    ]
    return "\n".join(lines)


def _image_words(source: ModelSource, result: Result, *, is_told: bool) -> list[str]:
    assert source.transformers is not None
    if source.transformers.task != "image-classification":
        return []
    missing = f"; {PROCESSOR_FILES[0]} has no words for that, and is not in this folder"
    return [f"- Images: {result.preprocessing}{'' if is_told else missing}"]


_PIPELINES: Mapping[str, str] = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "seq2seq": "text2text-generation",
    "sequence-classification": "text-classification",
    "image-classification": "image-classification",
}
