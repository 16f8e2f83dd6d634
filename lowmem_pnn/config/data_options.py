"""Options about data: where it is, its parts, and how samples are shown to the model; the fields of `FitConfig` about them."""

import csv
import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from lowmem_pnn.config.field_types import Positive

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and deviation of ImageNet's training images in [0, 1], as torchvision's weights were trained with them."""

# Above it a single image would be larger than most budgets; a decoded one has three values a pixel.
_LARGEST_SIDE = 16384


def _image_size(value: Any) -> Any:
    """Return a size as `N` or `HxW`, in its shortest form."""
    if isinstance(value, tuple | list) and len(value) == 2:
        value = "x".join(map(str, value))
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", str(value).strip())
    if match is None or isinstance(value, bool):
        raise ValueError("no size in pixels; write N, such as 224, or HxW, such as 240x320")
    height, width = int(match[1]), int(match[2] or match[1])
    if not (1 <= height <= _LARGEST_SIDE and 1 <= width <= _LARGEST_SIDE):
        raise ValueError(f"sides are from 1 to {_LARGEST_SIDE} pixels")
    return str(height) if height == width else f"{height}x{width}"


def _normalization(value: Any) -> Any:
    """Return `none`, `auto`, `imagenet`, or means and deviations as text."""
    if isinstance(value, tuple | list) and len(value) == 2:
        value = "/".join(",".join(map(str, part)) if isinstance(part, tuple | list) else str(part) for part in value)
    text = str(value).strip()
    if text in ("none", "auto", "imagenet"):
        return text
    try:
        mean, std = numbers_of(text)
    except ValueError:
        raise ValueError(
            "none of none, auto, imagenet, MEAN/STD; write, for example, 0.5/0.25, or a value for each channel: 0.5,0.4,0.4/0.2,0.2,0.3"
        ) from None
    if len(mean) != len(std):
        raise ValueError(f"has {len(mean)} means and {len(std)} deviations; give as many of both")
    if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise ValueError("means are finite, and deviations positive")
    return text


def _columns(value: Any) -> Any:
    """Return names of columns as a tuple."""
    if value is not None and not isinstance(value, str | list | tuple):
        return value  # refused by its type
    try:
        names = next(csv.reader([value], skipinitialspace=True)) if isinstance(value, str) else value
    except csv.Error:
        raise ValueError("a name with a line break is in quotes, as in a table") from None
    if names is not None and not (names and all(isinstance(name, str) and name.strip() for name in names)):
        raise ValueError("a name of a column is missing; give A, or A,B")
    return None if names is None else tuple(dict.fromkeys(name.strip() for name in names))


def columns_text(names: Sequence[str]) -> str:
    """Return names of columns as one types them: as a line of a table, so that a name with a comma is in quotes.

    Args:
        names: the names.

    Example:
        >>> columns_text(["width", "height, cm"])
        'width,"height, cm"'
    """
    line = io.StringIO()
    csv.writer(line).writerow(names)
    return line.getvalue().removesuffix("\r\n")


def numbers_of(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the means and deviations of a text `MEAN/STD`.

    Args:
        text: numbers separated by commas, a slash, and as many numbers.

    Raises:
        ValueError: it is no such text.

    Example:
        >>> numbers_of("0.5,0.4/0.2,0.3")
        ((0.5, 0.4), (0.2, 0.3))
    """
    mean, std = text.split("/")
    return tuple(map(float, mean.split(","))), tuple(map(float, std.split(",")))


Columns = Annotated[tuple[str, ...] | None, BeforeValidator(_columns)]
ImageSize = Annotated[str, BeforeValidator(_image_size)]
Normalization = Annotated[str, BeforeValidator(_normalization)]
Augmentation = Literal["none", "basic", "randaugment", "trivial"]
ResizeMode = Literal["crop", "squash", "pad"]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DataOptions:
    """What decides which samples a model sees, and how."""

    data: str = Field(
        description=(
            "digits, mnist, fashion-mnist, emnist-balanced, cifar10, cifar100, imagefolder:DIR, segmentation:DIR (folders images and "
            "masks), npz:FILE, csv:FILE, parquet:FILE, hfdata:DIR|NAME, text:FILE|DIR, jsonl:FILE, tokens:FILE.bin, or file.py:factory."
        )
    )
    target: Columns = Field(
        default=None,
        description=(
            'Column of a table that is to be predicted, or several, as A,B; a comma in a name is quoted: "A,B" (csv:, parquet:, jsonl:, '
            "hfdata:)."
        ),
    )
    val_data: str | None = Field(
        default=None,
        description=(
            "Data to validate on, of any source that --data takes: its validation part, or all of it where it has one part. Classes "
            "are matched by their names, where both sources have names."
        ),
    )
    test_data: str | None = Field(
        default=None, description="Data to test on, as --val-data: its test part, or all of it where it has one part."
    )
    data_root: Path = Field(
        default=Path("data"), description="Folder that downloaded data sets, and the tokens of texts, are kept in."
    )
    image_size: ImageSize | None = Field(
        default=None, description="Size that images are brought to: a side of a square, or HxW in pixels. By default their own."
    )
    resize: ResizeMode = Field(
        default="crop",
        description=(
            "How images are brought to --image-size, always with antialiasing. crop: they cover it, and the centre is kept. squash: "
            "height and width by themselves. pad: they fit into it, and black is put around them."
        ),
    )
    normalize: Normalization | None = Field(
        default=None,
        description=(
            "Normalisation of images, by channel: (value - mean) / deviation, of values from 0 to 1. imagenet: that of torchvision's "
            "weights. auto: that of the pretrained weights, else computed from training images. MEAN/STD: 0.5/0.25, or a value for each "
            "channel. Of tables auto standardises each column of numbers by the training part. By default auto for tables, else none."
        ),
    )
    augment: Augmentation = Field(
        default="none",
        description=(
            "Augmentation of training images, anew in every epoch. basic: random crops and flips. randaugment, trivial: these, and then "
            "torchvision's RandAugment or TrivialAugmentWide."
        ),
    )
    mixup: Positive | None = Field(
        default=None,
        description=(
            "MixUp: samples of a training batch are added, in shares from Beta(MIXUP, MIXUP), and so are their labels (exact, backprop, "
            "incubate; neuroflux at each block). With --cutmix one of the two is drawn for each batch."
        ),
    )
    cutmix: Positive | None = Field(
        default=None,
        description="CutMix: a box of each image of a training batch is another image's, and the labels are mixed as --mixup does.",
    )
    workers: NonNegativeInt = Field(
        default=0,
        description=(
            "Processes of the host that read, decode and augment samples; their memory is not in the budget. Order and values are the "
            "same whatever their number; 0: this process does it."
        ),
    )
    drop_last: bool = Field(
        default=False,
        description=(
            "Leave out, in every epoch, the samples at its end that make no whole batch, as DataLoader(drop_last=True) does. Partitions that "
            "learn from kept activations leave out the same ones in every epoch."
        ),
    )
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1,
        description="Share of the training data that is kept for validation; of data with a validation part, 0 leaves that out.",
    )
    test_fraction: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None,
        description=(
            "Share of the training data that is kept for the test, where the data has no test part; by default 0.1 of tables, else none."
        ),
    )
    train_limit: PositiveInt | None = Field(
        default=None, description="Largest number of training samples to use, chosen at random by the seed."
    )
    test_limit: PositiveInt | None = Field(
        default=None, description="Largest number of test samples to use, chosen at random by the seed."
    )
    skip_broken: bool = Field(
        default=False,
        description=(
            "Read every sample once before training, and leave out those that cannot be read, hold NaN or infinity, or are of another "
            "size than most."
        ),
    )

    @property
    def changes_samples(self) -> bool:
        """Whether the model sees other training samples in every epoch, since they are augmented or mixed."""
        return self.augment != "none" or self.mixing is not None

    @property
    def mixing(self) -> str | None:
        """The option by which batches are mixed; None where they are not."""
        return "--mixup" if self.mixup is not None else "--cutmix" if self.cutmix is not None else None

    @property
    def image_shape(self) -> tuple[int, int] | None:
        """Height and width of `image_size`; None where images keep their own size."""
        if self.image_size is None:
            return None
        height, _, width = self.image_size.partition("x")
        return int(height), int(width or height)
