"""Images of transformers' models: how a folder's `preprocessor_config.json` has them prepared, as far as it is followed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem_pnn.config.transformers_place import read_settings
from lowmem_pnn.sources.image_stats import ImageStats

_FILE = "preprocessor_config.json"
# Steps that are not followed, where a processor has them.
_OTHER_STEPS = ("include_top", "rescale_offset", "do_flip_channel_order")


def image_stats(folder: Path | None) -> tuple[ImageStats | None, str | None]:
    """Return how images are prepared for a model, and what is to be said where that is not followed; None where nobody says.

    Args:
        folder: Folder of the model; None where there is none.
    """
    settings = None if folder is None else read_settings(folder / _FILE)
    if settings is None:
        return None, None
    if (step := _other_step(settings)) is not None:
        return None, f"{_FILE} prepares images by {step}, which is not followed: --normalize auto is that of the training images"
    if settings.get("do_normalize") is False:
        return ImageStats((0.0,), (1.0,), _sides(settings)), None
    if "image_mean" not in settings or "image_std" not in settings:
        return None, None
    return ImageStats(tuple(map(float, settings["image_mean"])), tuple(map(float, settings["image_std"])), _sides(settings)), None


def _other_step(settings: Mapping[str, Any]) -> str | None:
    """Return the setting by which pixels become other values than (value / 255 - mean) / deviation; None where none does."""
    if (step := next((name for name in _OTHER_STEPS if settings.get(name)), None)) is not None:
        return step
    if settings.get("do_rescale") is False:
        return "do_rescale"
    factor = settings.get("rescale_factor", 1 / 255)
    is_usual = isinstance(factor, int | float) and abs(factor * 255 - 1) < 1e-3
    return None if is_usual else "rescale_factor"


def _sides(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    size = settings.get("crop_size") or settings.get("size")
    size = {"height": size, "width": size} if isinstance(size, int) else size
    if isinstance(size, dict) and "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    if isinstance(size, dict) and "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return None
