"""The host tier: what is kept, when it is read from there, and what reaches the files."""

import torch

from lowmem_pnn.sweep import host_tier
from lowmem_pnn.sweep.host_tier import HostTier

LAYOUTS = [
    ("weight/a", (torch.float32, (2, 3))),
    ("weight/b", (torch.float32, (100,))),
    ("optimizer/a/m", (torch.float32, (2, 3))),
]


def test_tensors_get_room_in_their_order_as_wholes() -> None:
    tier = HostTier(LAYOUTS, 50)
    kept = [tier.put(0, key, torch.zeros(shape), None) for key, (_, shape) in LAYOUTS]
    assert kept == [True, False, True]


def test_a_tensor_is_read_from_the_batch_after_it_was_written_and_saved_once() -> None:
    tier = HostTier(LAYOUTS, 1000)
    tier.expect("weight/a")
    tier.put(3, "weight/a", torch.tensor([4.0, 5.0]), 4)  # slices come in any order
    tier.put(3, "weight/a", torch.tensor([0.0, 1.0, 2.0, 3.0]), 0)
    assert not tier.has("weight/a"), "in the same batch the file has the values that are read"
    tier.end_batch()
    assert tier.has("weight/a")
    assert not tier.has("weight/b")
    whole, some = torch.empty(2, 3), torch.empty(2)
    tier.read("weight/a", None, whole)
    tier.read("weight/a", slice(3, 5), some)
    assert (whole.tolist(), some.tolist()) == ([[0, 1, 2], [3, 4, 5]], [3, 4])
    [(partition, [(key, tensor)])] = list(tier.unsaved())
    assert (partition, key, tensor.tolist()) == (3, "weight/a", whole.tolist())
    assert list(tier.unsaved()) == []
    tier.clear()
    assert not tier.has("weight/a")


def test_memory_that_the_system_refuses_leaves_the_tensor_to_its_file(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> torch.Tensor:
        raise MemoryError

    tier = HostTier(LAYOUTS, 1000)
    monkeypatch.setattr(host_tier, "aligned_empty", refuse)
    tier.expect("weight/a")
    assert not tier.put(0, "weight/a", torch.zeros(2, 3), None)
    monkeypatch.undo()
    assert not tier.put(0, "weight/a", torch.zeros(2, 3), None), "for good: some of its slices are in the file"
    tier.end_batch()
    assert not tier.has("weight/a")
