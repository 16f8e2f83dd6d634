"""A run's result as text for people: tables, facts, and a summary of six lines."""

import shlex
from collections.abc import Mapping
from typing import Any

from lowmem_pnn.config.code import DATA_FIELDS, python_objects, trust_words
from lowmem_pnn.engine.stalls import describe_stalls
from lowmem_pnn.pretrained.matching import describe_weights
from lowmem_pnn.reporting.result_fields import ResultFields
from lowmem_pnn.reporting.tables import describe_skipped, drive_share, layer_range, text_table, wrapped
from lowmem_pnn.units import format_bytes

# Scores on the test data that not every task has: what people call them, and their format.
_MORE_SCORES = {
    "miou": ("mean IoU", ".3f"), "average_precision": ("average precision", ".3f"), "mse": ("MSE", ".4g"), "mae": ("MAE", ".4g"),
    "r2": ("R2", ".3f"),
}  # fmt: skip
_KNOWN = (*_MORE_SCORES, "loss", "accuracy", "f1", "top5", "perplexity", "confusion")


def describe_result(result: ResultFields, width: int | None = None) -> str:
    """Return a result for people; its last six lines are a summary: needs, budget, peak, time, score, next command.

    Args:
        result: what a run came to.
        width: columns that tables and sentences are to fit, if they can; None for as many as they take.
    """
    table = [f"{result.model} on {result.data}, method {result.method}, {result.device}", "", _partition_table(result, width)]
    if result.exits:
        table += ["", _exit_table(result)]
    lines: list[str] = []
    if result.data_parts:
        lines += ["", f"data: {result.data_parts}"]
    if result.workers:
        lines.append(
            f"samples read by {result.workers} processes of the host, {format_bytes(result.host_peak_bytes)} of host memory in all"
        )
    lines += ["", _scores(result)]
    best = _moment(result.best_epoch, result.best_step)
    if result.stopped_after is not None or result.stopped_step is not None:
        lines.append(f"ended early, after {_end(result)}; the best was {best}")
    if result.weights_of == "best":
        lines.append(f"the weights are those of {best}, the best on the validation part")
    if result.precision != "fp32":
        skipped = f", {result.skipped_steps} steps skipped" if result.skipped_steps else ""
        lines.append(f"computed in {result.precision}{skipped}")
    lines.append(_disk(result))
    if result.peak_bytes > result.budget_bytes:
        lines.append(f"THE BUDGET WAS PASSED: {format_bytes(result.peak_bytes)} in use, of {format_bytes(result.budget_bytes)}")
    if result.skipped_samples["count"]:
        lines.append(describe_skipped(result.skipped_samples["names"], result.skipped_samples["count"]))
    if result.oom_retries:
        lines.append(f"{result.oom_retries} batches did not fit and were done again with smaller micro-batches")
    if result.compared == "no":
        lines.append("the model in layers was not compared with the model as a whole before training")
    if norm := result.batch_norm:
        lines.append(
            f"BatchNorm: {norm['layers']} layers normalised over as few as {norm['samples']} of the {norm['batch']} samples of a batch, "
            "and plain PyTorch over all of them"
        )
    if result.weights:
        lines.append(describe_weights(result.weights))
    lines += result.notes
    if result.module_state:
        lines.append(
            f"not in the weights, but changed by forwards: {', '.join(result.module_state)} (module_state in result.json)"
        )
    if check := result.check:
        more = check["unexplained_bytes"]
        lines.append(
            f"checked before training: predicted {format_bytes(check['predicted_bytes'])}, measured {format_bytes(check['measured_bytes'])}, "
            f"{format_bytes(abs(more))} {'more' if more > 0 else 'less'}"
        )
    for sample in result.samples:
        lines.append(f"after {sample['prompt']!r} the model said {sample['before']!r}, and says {sample['after']!r}")
    folder = "" if result.transformers_folder is None else f"; for transformers: {result.transformers_folder}"
    lines.append(f"weights: {result.weights_file}{folder}")
    if result.adapter is not None:
        reads = "PeftModel.from_pretrained reads it"
        if result.model.startswith("hf:"):
            reads = "AutoPeftModel classes load it on its base, with its tokenizer"
        merging = shlex.join(["lowmem-pnn", "export", result.workdir, "--merge", *trust_words(vars(result), ("model",))])
        if python_objects(vars(result), ("model",)):
            merging = f"lowmem_pnn.export({result.workdir!r}, merge=True, model=...)"
        lines.append(f"adapter: {result.adapter} (peft's {reads}); merged into its base: {merging}")
    # Tables have their own width, and a command is copied in one piece.
    *told, following = summary(result)
    sentences = [wrapped(line, width, "  ") for line in lines] + [
        "",
        *(wrapped(line, width, " " * 8) for line in told),
        following,
    ]
    return "\n".join(table + sentences)


def summary(result: ResultFields) -> list[str]:
    """Return the six lines that a run closes with: needs, budget, peak, time, score, next command.

    Args:
        result: what a run came to.
    """
    needs = [f"{format_bytes(result.plain_bytes)} plain PyTorch"] if result.plain_bytes is not None else []
    tightest = max(result.partitions, key=lambda partition: int(partition["predicted_peak_bytes"]))
    ahead = tightest.get("ahead_bytes", 0)
    reading = f" and {format_bytes(ahead)} to read ahead" if ahead else ""
    needs.append(f"here {format_bytes(tightest['predicted_peak_bytes'] - ahead)}{reading}")
    saved = ""
    if result.plain_bytes is not None and result.peak_bytes <= 0.995 * result.plain_bytes:
        saved = f", {1 - result.peak_bytes / result.plain_bytes:.0%} below plain PyTorch".replace("%", " %")
    told = {
        "needs": f"{'; '.join(needs)} (predicted)",
        "budget": f"{format_bytes(result.budget_bytes)} of {result.device}",
        "peak": f"{format_bytes(result.peak_bytes)}{saved}",
        "time": f"{result.seconds:.1f} s, {result.samples_per_second:.0f} samples/s",
        "score": score_text(result),
        "next": next_command(result),
    }
    return [f"{name:<7} {text}" for name, text in told.items()]


def next_command(result: ResultFields) -> str:
    """Return what one would type next: texts of a language model, an export where it takes none, predictions of others, or a call in Python.

    Args:
        result: what a run came to.
    """
    if python_objects(vars(result), ("model", *DATA_FIELDS)):
        return f"lowmem_pnn.load({result.workdir!r}{', model=...' if python_objects(vars(result), ('model',)) else ''})"
    targets: Mapping[str, Any] = result.form.get("targets", {})
    if result.perplexity is not None or targets.get("kind") == "tokens":
        trust = trust_words(vars(result), ("model",))
        if _has_texts(result):
            return shlex.join(["lowmem-pnn", "generate", result.workdir, "--prompt", "Once upon a time", *trust])
        return shlex.join(["lowmem-pnn", "export", result.workdir, "--to", "safetensors", *trust])
    is_no_table = targets.get("kind") == "own" or (targets.get("kind") == "values" and len(targets.get("shape", ())) > 1)
    out = "masks/" if targets.get("kind") == "mask" else "predictions.npz" if is_no_table else "predictions.csv"
    trust = trust_words(vars(result), ("model", *DATA_FIELDS))
    return shlex.join(["lowmem-pnn", "predict", result.workdir, "--out", out, *trust])


def _has_texts(result: ResultFields) -> bool:
    """Whether a language model goes on with texts, which its data's tokenizer reads; one that answers a source does not."""
    return result.data.startswith(("text:", "jsonl:", "parquet:", "hfdata:")) and "decoder_input_ids" not in str(result.form)


def score_text(result: ResultFields) -> str:
    """Return the score that a model is judged by first, in words.

    Args:
        result: what a run came to.
    """
    test = result.scores.get("test", {})
    scores = (
        ("test accuracy", result.test_accuracy, ".1%"),
        ("perplexity", result.perplexity, ".2f"),
        *((f"test {name}", test.get(key), form) for key, (name, form) in _MORE_SCORES.items()),
        ("test loss", result.test_loss, ".4g"),
        ("validation accuracy", result.val_accuracy, ".1%"),
        ("validation loss", result.val_loss, ".4g"),
        ("training loss", result.train_loss, ".4g"),
    )
    return next((f"{name} {value:{form}}" for name, value, form in scores if value is not None), "none: nothing was measured")


def _partition_table(result: ResultFields, width: int | None) -> str:
    rows = [
        (
            str(number + 1),
            layer_range(partition["layers"]),
            f"{partition['params']:,}",
            f"{partition['micro_batch']} of {partition['batch']}",
            str(partition["epochs"]),
            format_bytes(partition["predicted_peak_bytes"] - partition.get("ahead_bytes", 0)),
            format_bytes(partition.get("ahead_bytes", 0)),
            format_bytes(partition["peak_bytes"]),
            f"{partition['seconds']:.1f}",
        )
        for number, partition in enumerate(result.partitions)
    ]
    headings = ("partition", "layers", "parameters", "micro-batch", "epochs", "needs", "ahead", "peak", "seconds")
    return text_table(headings, rows, width, spare=("ahead", "epochs", "parameters", "micro-batch"))


def _exit_table(result: ResultFields) -> str:
    """Return the table of early exits, with the chosen one marked."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    rows = [
        (
            f"{number}{' chosen' if number == result.chosen_exit else ''}",
            exit["layer"],
            f"{exit['params']:,}",
            percent(exit["val_accuracy"]),
            percent(exit["test_accuracy"]),
            f"{exit['samples_per_second']:.0f}",
        )
        for number, exit in enumerate(result.exits, 1)
    ]
    return text_table(("exit", "after layer", "parameters", "validation", "test", "samples/s"), rows)


def _scores(result: ResultFields) -> str:
    test = result.scores.get("test", {})
    scores = (
        ("training loss", result.train_loss, ".4g"),
        ("validation loss", result.val_loss, ".4g"),
        ("validation accuracy", result.val_accuracy, ".1%"),
        ("test accuracy", result.test_accuracy, ".1%"),
        ("test F1", result.test_f1, ".3f"),
        ("test loss", result.test_loss if result.test_accuracy is None else None, ".4g"),
        ("perplexity", result.perplexity, ".2f"),
        *((f"test {name}", test.get(key), form) for key, (name, form) in _MORE_SCORES.items()),
        *((f"test {key}", value, ".4g") for key, value in test.items() if key not in _KNOWN and isinstance(value, float)),
    )
    return ", ".join(f"{name} {value:{form}}" for name, value, form in scores if value is not None)


def _disk(result: ResultFields) -> str:
    """Return the traffic of the drive, and the shares of the training time in which computing waited."""
    written = f"{format_bytes(result.bytes_written)} written{drive_share(result.bytes_written, result.drive_tbw)}"
    text = f"disk: {format_bytes(result.bytes_read)} read, {written}"
    waited = [partition.get("waited", {}) for partition in result.partitions]
    seconds = sum(partition["seconds"] for partition in result.partitions)
    kinds = dict.fromkeys(kind for own in waited for kind in own)
    if seconds and kinds:
        text += "; " + describe_stalls({kind: sum(own.get(kind, 0.0) for own in waited) / seconds for kind in kinds})
    return text


def _end(result: ResultFields) -> str:
    """Return when training ended early in words, of the epochs that were watched."""
    recovery = result.training.get("recovery_epochs")
    epochs = result.epochs[-1] if recovery is None else recovery
    of = f" of {epochs}" if result.stopped_after is not None else ""
    if recovery is not None:
        of += " of recovery"
    elif result.method == "pnn" and len(result.partitions) > 1:
        of += " of the last partition"
    return _moment(result.stopped_after, result.stopped_step) + of


def _moment(epoch: int | None, step: int | None) -> str:
    """Return a moment of training in words: an epoch, or a step within one."""
    return f"epoch {epoch}" if epoch is not None or step is None else f"step {step}"
