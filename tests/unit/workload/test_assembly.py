"""Assembly: integers as tokens or as numbers, whichever the model takes, and samples whose axes are in another order."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.quantization.stored_weights import StoredForm
from lowmem_pnn.workload import Workload, make_workload
from lowmem_pnn.workload.inputs import python_inputs

TABLE = torch.arange(70).reshape(10, 7) % 20, torch.arange(10) % 3
TOKENS, NUMBERS = torch.int64, torch.float32


def assembled(build: Any, data: Any, **options: Any) -> Workload:
    config = configure(max_gpu_mem="100MB", model="python:net", data="python:table", device="cpu", method="exact", **options)
    return make_workload(config, *python_inputs(build, data, data, data)(config), torch.device("cpu"))


class Net(nn.Module):
    """A model that begins with something done to whole numbers (B, 7), by name."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding = nn.Embedding(20, 4)
        self.inner = nn.Linear(4 if kind in ("embedding", "function", "index", "onehot", "select") else 7, 3)
        self.normal = nn.LayerNorm(7)

    def forward(self, x: Tensor) -> Tensor:
        table = self.embedding.weight
        begins = {
            "embedding": lambda: self.embedding(x).mean(1),
            "function": lambda: F.embedding(x, table).mean(1),
            "index": lambda: table[x].mean(1),
            "onehot": lambda: F.one_hot(x, 20).float().mean(1) @ table,
            "select": lambda: table.index_select(0, x.flatten()).reshape(-1, 7, 4).mean(1),
            "bits": lambda: (x & 3).float(),
            "bitwise": lambda: torch.bitwise_or(x, 1).float(),
            "mask": lambda: ((x > 3) & (x < 7)).float(),
            "linear": lambda: x,
            "remainder": lambda: (x % 3).float(),
            "normal": lambda: self.normal(x),
        }
        unused = table.sum() + self.normal(torch.zeros(1, 7, device=x.device)).sum()
        return self.inner(begins[self.kind]()) + unused


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("embedding", TOKENS),
        ("function", TOKENS),
        ("index", TOKENS),
        ("onehot", TOKENS),
        ("select", TOKENS),
        ("bits", TOKENS),
        ("bitwise", TOKENS),
        ("mask", NUMBERS),
        ("linear", NUMBERS),
        ("remainder", NUMBERS),
        ("normal", NUMBERS),
    ],
)
def test_integers_are_what_the_model_takes(kind: str, dtype: torch.dtype) -> None:
    workload = assembled(lambda: Net(kind), TABLE)
    words = "int64 as it is" if dtype == TOKENS else "int64 to float32"
    assert (workload.dataset.dtype, workload.dataset.preprocessing) == (dtype, words)
    assert workload.chain.boundaries[0][0].dtype == dtype
    for name in ("train", "val", "test"):
        x, y = workload.splits[name].batch([1, 0])  # type: ignore[index]
        assert x.dtype == dtype
        numbers = [next(number for number in range(10) if torch.equal(row, TABLE[0][number].to(dtype))) for row in x]
        assert y.tolist() == [int(TABLE[1][number]) for number in numbers]


@pytest.mark.parametrize(
    "first", [nn.Linear(7, 4), nn.BatchNorm1d(7), nn.Sequential(nn.Unflatten(1, (1, 7)), nn.Conv1d(1, 4, 3), nn.Flatten())]
)
def test_integers_are_numbers_for_layers_that_calculate(first: nn.Module) -> None:
    def build() -> nn.Module:
        return nn.Sequential(first, nn.Linear(width, 3))

    width = {nn.Linear: 4, nn.BatchNorm1d: 7}.get(type(first), 20)
    for dtype in (torch.int64, torch.int32, torch.int16):
        assert assembled(build, (TABLE[0].to(dtype), TABLE[1])).dataset.dtype == torch.float32


def test_tokens_with_a_label_each_stay_tokens() -> None:
    x = torch.arange(40).reshape(10, 4) % 5
    workload = assembled(lambda: nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 5)), (x, (x + 1) % 5))
    assert (workload.dataset.dtype, workload.dataset.label_shape) == (torch.int64, (4,))


def test_a_model_that_takes_neither_is_refused_for_what_it_is() -> None:
    with pytest.raises(ConfigError, match=r"does not run on samples of \(7,\) float32 in train mode.*(8|shape)"):
        assembled(lambda: nn.Sequential(nn.Linear(8, 3)), TABLE)


@pytest.mark.parametrize(
    ("shape", "build", "message"),
    [
        (
            (10, 10, 3),
            lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(128, 3)),
            r"which are \(10, 10, 3\), and takes \(3, 10, 10\): store channels first, as by x.transpose\(0, 3, 1, 2\) of an array",
        ),
        (
            (20, 4),
            lambda: nn.Sequential(nn.Conv1d(4, 2, 3), nn.Flatten(), nn.Linear(36, 3)),
            r"which are \(20, 4\), and takes \(4, 20\): store channels first, as by x.transpose\(0, 2, 1\)",
        ),
    ],
)
def test_channels_that_come_last_are_said(shape: tuple[int, ...], build: Any, message: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"model python:\S+ does not take the samples of data python-table, {message}"
    ) as raised:
        assembled(build, (torch.rand(10, *shape), TABLE[1]))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("options", [{"freeze": "0.*", "frozen_dtype": "bf16"}, {"lora": "r=2", "frozen_dtype": "nf4"}])
def test_frozen_weights_of_a_built_model_are_not_converted_to_be_cut(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[bool] = []
    encode = StoredForm.encode
    monkeypatch.setattr(StoredForm, "encode", lambda form, values: encoded.append(values.is_meta) or encode(form, values))
    model = nn.Sequential(nn.Linear(7, 9), nn.Linear(9, 3))
    before = torch.get_rng_state()
    workload = assembled(model, TABLE, **options)
    assert encoded
    assert all(encoded)
    assert all(tensor.is_meta for layer in workload.chain.layers for tensor in layer.parameters().values())
    assert torch.equal(torch.get_rng_state(), before), "adapters draw"
    assert not any(tensor.is_meta for tensor in workload.build_model(0).parameters())


def test_other_faults_of_a_model_are_not_taken_for_the_order_of_axes() -> None:
    with pytest.raises(ConfigError, match=r"does not run on samples of \(10, 10, 3\) float32"):
        assembled(
            lambda: nn.Sequential(nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(128, 3)), (torch.rand(10, 10, 10, 3), TABLE[1])
        )


class FrozenNorm(nn.Sequential):
    """Begins with a frozen layer, whose BatchNorm is in eval mode."""

    def __init__(self, track: bool) -> None:
        super().__init__(nn.Linear(7, 6), nn.BatchNorm1d(6, track_running_stats=track), nn.Linear(6, 3))
        for module in list(self)[:2]:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self[1].eval()
        return self


@pytest.mark.parametrize("track", [True, False])
def test_what_is_normalised_over_a_batch_is_not_written_once_for_all_epochs(track: bool) -> None:
    workload = assembled(lambda: FrozenNorm(track), (torch.rand(10, 7), TABLE[1]), epochs=2)
    assert workload.fixed_layers == track  # without statistics it normalises over the batch in eval mode too
    assert workload.batch_norms() == ([] if track else ["1"])


class ByBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 7), nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.a(x)
        return self.b(hidden.relu() if len(x) > 12 else hidden)


@pytest.mark.parametrize(("batch", "names"), [(10, ["0.a", "0.b", "2"]), (16, ["0", "1"])])
def test_a_model_is_looked_at_with_as_many_samples_as_a_batch_has(batch: int, names: list[str]) -> None:
    data = torch.rand(36, 7), torch.arange(36) % 3
    chain = assembled(lambda: nn.Sequential(ByBatch(), nn.Linear(7, 3)), data, batch_size=batch).chain
    assert [layer.name for layer in chain.layers] == names
