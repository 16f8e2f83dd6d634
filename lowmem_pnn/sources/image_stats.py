"""Image statistics: how the images were prepared that pretrained weights were trained on."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageStats:
    """Preparation of the images of pretrained weights.

    Args:
        mean: Mean of each channel, of values from 0 to 1.
        std: Standard deviation of each channel.
        size: Height and width in pixels that they were brought to; None where nobody says.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
