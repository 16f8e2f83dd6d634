"""How a trained model is to be shown images, as transformers reads it: `preprocessor_config.json`, for images as they were in training."""

from typing import Any

from lowmem_pnn.config.fit_config import FitConfig
from lowmem_pnn.reporting.result import Result
from lowmem_pnn.zoo.model_source import ModelSource

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Files that may say how images are prepared; the first is read by every release of transformers."""

_BYTES = "uint8 / 255"
_BILINEAR = 2


def keeps_processor(source: ModelSource, config: FitConfig, result: Result) -> bool:
    """Decide whether the processor of the model that training began with is right for what was trained.

    It is for models of something else than images; of images that were given as numbers, prepared before, nothing better is known.

    Args:
        source: Model of transformers.
        config: Options of the run.
        result: What it came to.
    """
    is_image = source.transformers is not None and source.transformers.task == "image-classification"
    is_given = result.preprocessing.startswith("float") and config.image_shape is None and "mean" not in result.preparation
    return not is_image or is_given


def image_processor(config: FitConfig, result: Result) -> dict[str, Any] | None:
    """Return settings by which transformers prepares images as a run did; None where it has none for that.

    Args:
        config: Options of the run.
        result: What it came to.
    """
    shapes = [tuple(tensor["shape"]) for tensor in result.form.get("inputs", ())]
    if len(shapes) != 1 or len(shapes[0]) != 3 or shapes[0][0] not in (1, 3) or _BYTES not in result.preprocessing.split(", "):
        return None
    channels, height, width = shapes[0]
    is_cropped = config.image_shape is not None and config.resize == "crop"
    if config.image_shape is not None and (config.resize == "pad" or (is_cropped and height != width)):
        return None
    mean, std = (list(result.preparation.get(name, ())) for name in ("mean", "std"))
    return {
        # It has no steps of its own beside these.
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": height} if is_cropped else {"height": height, "width": width},
        "resample": _BILINEAR,
        "do_center_crop": is_cropped,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": bool(mean),
        # A mean of 0 and a deviation of 1 change nothing.
        "image_mean": (mean or [0.0]) * (channels if len(mean) < 2 else 1),
        "image_std": (std or [1.0]) * (channels if len(std) < 2 else 1),
    }
