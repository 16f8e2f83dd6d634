"""Code that a configuration names: factories of models and data, and losses, which are imported. No imports here: the supervisor reads it."""

CODE_FIELDS = ("model", "data", "val_data", "test_data", "loss")
"""Fields of `FitConfig` that may name code."""

# What stands before the colon where no code is named.
_DATA = ("npz", "imagefolder", "text", "jsonl", "tokens", "csv", "parquet", "segmentation", "hfdata", "python")
_BUILT_IN = {
    "model": ("mlp", "gpt", "timm", "hf", "python"),
    "data": _DATA,
    "val_data": _DATA,
    "test_data": _DATA,
    "loss": ("python",),
}


def names_code(field: str, spec: str | None) -> bool:
    """Decide whether a model, data or a loss is a user's code, which is imported for it.

    Args:
        field: one of `CODE_FIELDS`.
        spec: its text, as the option has it; None where it is not given.

    Example:
        >>> names_code("model", "net.py:build"), names_code("model", "mlp:64-10"), names_code("data", "npz:x.npz")
        (True, False, False)
    """
    return spec is not None and ":" in spec and spec.partition(":")[0] not in _BUILT_IN[field]
