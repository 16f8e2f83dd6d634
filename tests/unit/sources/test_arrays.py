"""Arrays as data: what of them is hashed."""

import pytest
import torch

from lowmem_pnn.sources.arrays import hash_tensor


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
