"""Resizing: images of any size brought to one size by torchvision, in one of three ways.

    crop     +--+=======+--+      squash   +=======+      pad      +-------+
             |  |       |  |               |       |               |=======|
             |  |       |  |               |       |               |=======|
             +--+=======+--+               +=======+               +-------+

The double lines are what the model sees of a wide image; around a padded one it sees black.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lowmem_pnn.sources.arrays import FEW_OPERATIONS
from lowmem_pnn.sources.imports import import_torchvision

# Pixels of an image between resizing and cropping: a strip that is as long as it is thin would take all memory.
_MOST_PIXELS = 1 << 26


@dataclass(frozen=True)
class Resize:
    """Brings images to one size.

    Args:
        height: Rows of the result.
        width: Columns of the result.
        mode: `crop`, the image covers the size and its centre is kept; `squash`, height and width are changed by themselves; `pad`,
            the image fits into the size, and black is put around it.

    Example:
        >>> import torch
        >>> Resize(4, 4, "pad")(torch.ones(1, 2, 4))[0, :, 0]
        tensor([0., 1., 1., 0.])
    """

    height: int
    width: int
    mode: Literal["crop", "squash", "pad"]

    def __call__(self, images: Tensor) -> Tensor:
        """Resize images of one size.

        Args:
            images: Images (..., C, H, W), uint8 or numbers.

        Returns:
            Images (..., C, height, width) of the same type; bytes are rounded.
        """
        functional = import_torchvision("transforms.v2.functional")
        rows, columns = self.between(*images.shape[-2:])
        out: Tensor = functional.resize(images, [rows, columns], antialias=True)
        if self.mode == "crop":
            return functional.center_crop(out, [self.height, self.width])  # type: ignore[no-any-return]
        top, left = (self.height - rows) // 2, (self.width - columns) // 2
        return functional.pad(out, [left, top, self.width - columns - left, self.height - rows - top])  # type: ignore[no-any-return]

    def masks(self, masks: Tensor, outside: int) -> Tensor:
        """Resize masks of one size as their images are, by the nearest pixel: between two classes there is none.

        Args:
            masks: Class numbers (..., H, W).
            outside: Class number of what is around a padded image.

        Returns:
            Class numbers (..., height, width) of the same type.
        """
        functional = import_torchvision("transforms.v2.functional")
        rows, columns = self.between(*masks.shape[-2:])
        masks = masks if 0 <= outside < 256 and masks.dtype not in FEW_OPERATIONS else masks.long()
        nearest = functional.InterpolationMode.NEAREST
        out: Tensor = functional.resize(masks.unsqueeze(-3), [rows, columns], interpolation=nearest)
        if self.mode == "crop":
            out = functional.center_crop(out, [self.height, self.width])
        else:
            top, left = (self.height - rows) // 2, (self.width - columns) // 2
            around = [left, top, self.width - columns - left, self.height - rows - top]
            out = functional.pad(out, around, fill=outside) if any(around) else out
        return out.squeeze(-3)

    def between(self, height: int, width: int) -> tuple[int, int]:
        """Return the size to which an image is resized, before it is cropped or padded.

        Args:
            height: Rows of the image.
            width: Columns of the image.
        """
        if self.mode == "squash":
            return self.height, self.width
        # As torchvision rounds the longer side: down.
        by_height = self.height, max(1, self.height * width // height)
        by_width = max(1, self.width * height // width), self.width
        covers = by_height[1] >= self.width
        return by_height if covers == (self.mode == "crop") else by_width

    def fault(self, height: int, width: int) -> str | None:
        """Return in words why an image cannot be resized; None where it can.

        Args:
            height: Rows of the image.
            width: Columns of the image.
        """
        rows, columns = self.between(height, width)
        if rows * columns <= _MOST_PIXELS:
            return None
        return (
            f"is {width} x {height} pixels, and would have {columns} x {rows} before it is cropped to {self.width} x {self.height}; crop "
            "it, or give --resize squash or pad"
        )

    @property
    def steps(self) -> tuple[str, ...]:
        """The steps in words."""
        size = f"{self.height}x{self.width}"
        if self.mode == "squash":
            return (f"resized to {size} (bilinear, antialiased)",)
        if self.mode == "pad":
            return (f"resized to fit into {size} (bilinear, antialiased)", "black put around them")
        first = f"shorter side resized to {self.height}" if self.height == self.width else f"resized to cover {size}"
        return (f"{first} (bilinear, antialiased)", f"centre {size} kept")
