"""Packs: where tensors lie in a buffer, and how those of one buffer are found again."""

import torch

from lowmem_pnn.sweep.packs import by_buffer, places_of


def test_tensors_of_a_pack_are_aligned_do_not_overlap_and_change_by_themselves() -> None:
    specs = [(torch.float32, (3, 5)), (torch.int64, ()), (torch.bfloat16, (7,)), (torch.uint8, (0, 4)), (torch.float32, (65,))]
    places, size = places_of(specs)
    buffer = torch.zeros(size, dtype=torch.uint8)
    tensors = [place.view(buffer) for place in places]
    assert [(one.dtype, tuple(one.shape)) for one in tensors] == specs
    assert all(place.begin % 64 == 0 for place in places)
    for number, one in enumerate(tensors):
        one.fill_(number + 1)
    assert [one.unique().tolist() for one in tensors] == [[1], [2], [3], [], [5]]
    versions = [one._version for one in tensors]
    tensors[0].add_(1)
    assert [one._version - before for one, before in zip(tensors, versions, strict=True)] == [1, 0, 0, 0, 0]


def test_tensors_are_grouped_by_the_memory_that_they_lie_in() -> None:
    places, size = places_of([(torch.float32, (4,))] * 3)
    buffer = torch.arange(size, dtype=torch.uint8)
    first, second, third = (place.view(buffer) for place in places)
    alone = torch.ones(2)
    (span, own), (other, only) = by_buffer([third, alone, second])
    # From the first of them to the end of the last: without what lies before.
    assert span.data_ptr() == second.data_ptr()
    assert len(span) == 64 + 16
    assert [number for number, _ in own] == [0, 2]
    host = span.clone()
    assert all(torch.equal(place.view(host), (third, None, second)[number]) for number, place in own)  # type: ignore[arg-type]
    assert [number for number, _ in only] == [1]
    assert torch.equal(only[0][1].view(other.clone()), alone)
    assert first.data_ptr() == buffer.data_ptr()
