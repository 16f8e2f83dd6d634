"""Statistics of the images that pretrained weights were trained on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageStats:
    """What pretrained weights expect of images.

    Args:
        mean: Mean of each channel, of values from 0 to 1.
        std: Standard deviation of each channel.
        size: Height and width; None where any will do.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None = None
