"""StorageTracker: what it counts, when it stops counting it, and how it refuses."""

import gc
import threading

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem_pnn.memory.storage_tracker import StorageTracker


def test_a_storage_counts_from_its_making_until_its_last_view_goes():
    with StorageTracker() as tracker:
        x = torch.empty(100, dtype=torch.float32)
        assert tracker.live == 400
        view = x[10:].view(9, 10)
        assert tracker.live == 400
        del x
        assert tracker.live == 400
        del view
        assert tracker.live == 0
    assert tracker.peak == 400


def test_every_dtype_counts_its_own_size():
    with StorageTracker() as tracker:
        kept = [torch.zeros(10, dtype=dtype) for dtype in (torch.bool, torch.int64, torch.bfloat16, torch.float64)]
    assert tracker.live == 10 * (1 + 8 + 2 + 8)
    assert len(kept) == 4


def test_what_was_there_before_does_not_count_nor_do_its_views():
    x = torch.ones(1000)
    with StorageTracker() as tracker:
        views = [x.view(10, 100), x.t() if x.dim() > 1 else x[1:], x.detach()]
        x.add_(1)
        assert tracker.live == 0
        views.append(x + 1)
        assert tracker.live == 4000


def test_torch_tensor_counts():
    with StorageTracker() as tracker:
        x = torch.tensor([1.0, 2.0, 3.0])
        assert tracker.live == 12
    assert x.sum() == 6


def test_resizing_in_place_is_seen():
    with StorageTracker() as tracker:
        x = torch.empty(10)
        x.resize_(100)
        assert tracker.live == 400


def test_out_variants_and_in_place_do_not_count_twice():
    with StorageTracker() as tracker:
        x = torch.zeros(50)
        torch.add(x, 1, out=x)
        x.mul_(2)
        assert tracker.live == tracker.peak == 200


def test_peak_holds_results_and_inputs_together_and_can_be_reset():
    with StorageTracker() as tracker:
        x = torch.zeros(100)
        x = x + 1
        assert (tracker.live, tracker.peak) == (400, 800)
        tracker.reset_peak()
        assert tracker.peak == 400
        x = x * 2
        assert tracker.peak == 800
    del x


def test_freed_after_leaving_is_no_longer_live_and_entering_again_goes_on():
    tracker = StorageTracker()
    with tracker:
        x = torch.zeros(100)
    assert tracker.live == 400
    del x
    assert tracker.live == 0
    y = torch.zeros(100)
    with tracker:
        z = y + 1
    assert tracker.live == 400
    assert z.shape == y.shape


def test_a_reference_cycle_counts_until_it_is_collected():
    with StorageTracker() as tracker:
        cycle = [torch.zeros(100)]
        cycle.append(cycle)
        del cycle
        assert tracker.live == 400
        gc.collect()
        assert tracker.live == 0


def test_backward_is_counted():
    layer = nn.Linear(30, 20)
    x = torch.ones(7, 30)
    with StorageTracker() as tracker:
        layer(x).sum().backward()
        assert tracker.live == 4 * (30 * 20 + 20)
    assert tracker.peak > tracker.live


def test_fake_counts_what_real_does():
    def step(layer, x):
        with StorageTracker() as tracker:
            layer(x).pow(2).mean().backward()
        return tracker.live, tracker.peak

    def net():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 5))

    real = step(net(), torch.ones(4, 3, 8, 8))
    with FakeTensorMode():
        fake = step(net(), torch.ones(4, 3, 8, 8))
    assert real == fake
    assert real[1] > real[0] > 0


def test_sparse_results_are_let_pass():
    with StorageTracker():
        x = torch.eye(3).to_sparse()
    assert x.is_sparse


def test_storages_freed_by_another_thread_are_seen():
    with StorageTracker() as tracker:
        box = [torch.zeros(100) for _ in range(50)]
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
        assert tracker.live == 0


def test_capacity_refuses_and_frees_what_it_refused():
    with StorageTracker(capacity_bytes=1000) as tracker:
        x = torch.zeros(200)
        with pytest.raises(torch.OutOfMemoryError) as caught:
            x.add(1)
        assert str(caught.value) == "out of memory: aten.add.Tensor asked for 800 B where 800 B of 1.0 kB are in use"
        assert tracker.live == tracker.peak == 800
        y = torch.zeros(50)
        assert tracker.live == 1000
        del x, caught  # the error's traceback holds the operation's arguments
        torch.zeros(200)
    assert y.numel() == 50


def test_capacity_refuses_inside_backward_with_the_same_error():
    layer = nn.Linear(50, 50)
    x = torch.ones(2, 50)
    with StorageTracker() as free:
        layer(x).sum().backward()
    layer.zero_grad()
    with StorageTracker(capacity_bytes=free.peak - 1) as tracker:
        loss = layer(x).sum()
        with pytest.raises(torch.OutOfMemoryError):
            loss.backward()
        layer.zero_grad()
    with StorageTracker(capacity_bytes=free.peak) as tracker:
        layer(x).sum().backward()
    assert tracker.peak == free.peak


def test_in_place_work_goes_on_when_full():
    with StorageTracker(capacity_bytes=400):
        x = torch.zeros(100)
        x.add_(1)
        assert x[0].item() == 1
