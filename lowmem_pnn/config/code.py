"""Code that a configuration names: factories of models and data, which are imported. No imports here: the supervisor reads it."""

CODE_FIELDS = ("model", "data")
"""Fields of `FitConfig` that may name code."""

# What stands before the colon where no code is named.
_BUILT_IN = {
    "model": ("mlp", "gpt", "timm", "python"),
    "data": ("npz", "imagefolder", "text", "python"),
}


def names_code(field: str, spec: str) -> bool:
    """Decide whether a model or data is built by a user's code, which is imported for it.

    Args:
        field: `model` or `data`.
        spec: its text, as the option has it.

    Example:
        >>> names_code("model", "net.py:build"), names_code("model", "mlp:64-10"), names_code("data", "npz:x.npz")
        (True, False, False)
    """
    return ":" in spec and spec.partition(":")[0] not in _BUILT_IN[field]
