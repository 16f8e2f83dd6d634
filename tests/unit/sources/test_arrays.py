"""Arrays as data: what is taken for one, and what of them is hashed."""

import numpy as np
import pytest
import torch
from PIL import Image

from lowmem_pnn.errors import DataError
from lowmem_pnn.sources.arrays import as_tensor, hash_tensor


@pytest.mark.parametrize("position", [0, 40_000_001, 69_999_999])
def test_a_large_array_is_hashed_to_its_last_byte(position: int) -> None:
    import hashlib

    x = torch.zeros(70_000_000 - 3, dtype=torch.uint8)
    digests = []
    for value in (0, 1):
        x[min(position, len(x) - 1)] = value
        digest = hashlib.sha256()
        hash_tensor(digest, x)
        digests.append(digest.hexdigest())
    assert digests[0] != digests[1]


def test_a_list_of_images_with_a_palette_is_no_list_of_grey_values() -> None:
    images = [Image.fromarray(np.full((4, 5), number, dtype=np.uint8)) for number in (1, 2)]
    assert as_tensor(images, "mine").tolist() == [np.asarray(image).tolist() for image in images]
    images[1].putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    assert as_tensor(images, "mine", palette=True).shape == (2, 4, 5)
    with pytest.raises(
        DataError, match=r"^mine holds an image of mode P, whose values are places in a palette and no colours; give"
    ):
        as_tensor(images, "mine")
