"""Which tensors of a file a model takes: heads for other classes, prefixes, types, and every fault in one line."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import DenseNet, VisionTransformer

from lowmem_pnn.capture.capture import capture
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.pretrained.matching import PretrainedWeights, describe_weights, match
from lowmem_pnn.pretrained.old_names import renamed
from lowmem_pnn.pretrained.state_dicts import GivenTensors


class Net(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
        self.register_buffer("spare", torch.zeros(2))
        self.head = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def matched(state: dict[str, Any], model: nn.Module | None = None) -> PretrainedWeights:
    chain = capture(model or Net(), TensorSpec((4,), torch.float32))
    return match(GivenTensors(state), chain, "net")


def test_all_is_taken_where_all_fits() -> None:
    found = matched(Net().state_dict())
    assert dict(found.names) == {name: name for name in Net().state_dict()}
    assert (found.new, found.left_out, found.prefix, found.cast) == ([], [], "", 0)


def test_a_head_for_other_classes_is_new() -> None:
    found = matched(Net(7).state_dict())
    assert found.new == ["head.weight (3, 5)", "head.bias (3,)"]
    assert set(found.names) == set(Net().state_dict()) - {"head.weight", "head.bias"}


def test_a_head_that_is_not_there_is_new_and_another_is_left_out() -> None:
    state = {name.replace("head", "classifier"): value for name, value in Net().state_dict().items()}
    found = matched(state)
    assert found.new == ["head.weight (3, 5)", "head.bias (3,)"]
    assert found.left_out == ["classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "backbone."])
def test_a_prefix_of_a_wrapper_is_left_off(prefix: str) -> None:
    found = matched({prefix + name: value for name, value in Net().state_dict().items()})
    assert found.prefix == prefix
    assert dict(found.names) == {name: prefix + name for name in Net().state_dict()}


def test_other_names_may_be_beside_those_with_a_prefix() -> None:
    state = {f"module.{name}": value for name, value in Net().state_dict().items()}
    found = matched({"n_averaged": torch.tensor(3), "criterion.weight": torch.ones(3), **state})
    assert (found.prefix, found.left_out) == ("module.", ["n_averaged", "criterion.weight"])
    found = matched({**state, "head.bias": torch.zeros(3)})
    assert found.names["head.bias"] == "module.head.bias"


def test_values_come_in_the_models_type(tmp_path: Path) -> None:
    state = {name: value.half() if value.is_floating_point() else value for name, value in Net().state_dict().items()}
    found = matched(state)
    assert found.cast == 8
    with found.reading(tmp_path) as read:
        ((start, weight),) = read("head.weight", (torch.float32, (3, 5)))
        assert (start, weight.dtype) == (0, torch.float32)
        assert torch.equal(weight, state["head.weight"].float().flatten())


def test_a_file_of_old_has_no_counts_of_batches() -> None:
    state = {name: value for name, value in Net().state_dict().items() if "num_batches" not in name}
    assert len(matched(state).names) == len(state)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x))
        return out


def test_a_tied_weight_may_have_any_of_its_names() -> None:
    state = Tied().state_dict()
    del state["a.weight"]
    assert dict(matched(state, Tied()).names) == {"a.weight": "b.weight", "a.bias": "a.bias", "b.bias": "b.bias"}


def test_a_tied_weight_that_differs_in_the_file_is_refused(tmp_path: Path) -> None:
    state = Tied().state_dict()
    same = {**state, "b.weight": state["b.weight"].clone().double()}
    for given, text in (
        (same, None),
        ({**state, "b.weight": state["b.weight"] + 1}, "'a.weight' and 'b.weight' differ in the file"),
    ):
        with matched(given, Tied()).reading(tmp_path) as read:
            if text is None:
                assert torch.equal(next(read("a.weight", (torch.float32, (4, 4))))[1], state["a.weight"].flatten())
                continue
            with pytest.raises(ConfigError, match=text):
                list(read("a.weight", (torch.float32, (4, 4))))
    with pytest.raises(ConfigError, match=r"b\.weight is one tensor with a\.weight in the model, and .*\(2, 4\)"):
        matched({**state, "b.weight": torch.zeros(2, 4)}, Tied())


@pytest.mark.parametrize("scale", ["_scale", "_scale_inv", None])
def test_weights_of_eight_bits_are_not_taken_without_their_scale(scale: str | None) -> None:
    state = Net().state_dict()
    state["body.0.weight"] = state["body.0.weight"].to(torch.float8_e4m3fn)
    if scale is None:
        assert matched(state).cast == 1
        return
    with pytest.raises(
        ConfigError, match=rf"'body.0.weight' is float8_e4m3fn, and its scale 'body.0.weight{scale}' would be left out"
    ):
        matched({**state, f"body.0.weight{scale}": torch.ones(())})


def test_a_tied_weight_may_be_in_the_file_as_that_of_a_module_that_is_never_called() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.a = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
            self.a.weight = self.shared.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.a(x)
            return out

    state = Shared().state_dict()
    for left in ("shared.weight", "a.weight"):
        one = {name: value for name, value in state.items() if name in (left, "a.bias")}
        found = matched(one, Shared())
        assert dict(found.names) == {"shared.weight": left, "a.bias": "a.bias"}
        assert found.left_out == []
    with pytest.raises(ConfigError, match=r"missing in the file: shared\.weight"):
        matched({"a.bias": state["a.bias"]}, Shared())


def _renamed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    changed = {**state, **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"body__0__weight": torch.zeros(5, 6)}, "body.0.weight is float32 (5, 4) in the model and float32 (5, 6) in the file;"),
        ({"head__weight": torch.zeros(3, 6)}, "head.weight is float32 (3, 5) in the model and float32 (3, 6) in the file;"),
        ({"body__0__bias": torch.zeros(5, dtype=torch.int64)}, "body.0.bias is float32 (5,) in the model and int64 (5,) in the file;"),
        ({"body__0__bias": None, "body__1__bias": None}, "missing in the file: body.0.bias, body.1.bias;"),
        (
            {"body__0__weight": torch.zeros(5, 6), "body__1__bias": None},
            "body.0.weight is float32 (5, 4) in the model and float32 (5, 6) in the file, missing in the file: body.1.bias;",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_all_at_once(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        matched(_renamed(Net().state_dict(), **changes))
    start = "--weights the state_dict that was given does not fit model net: "
    assert str(raised.value) == f"{start}{text} give weights of this model, or the --model-arg that they were made with"


def test_long_lists_are_shortened() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    with pytest.raises(ConfigError, match=r"missing in the file: 1.weight, 1.bias, 2.weight, 2.bias and 4 more; give"):
        matched({"0.weight": torch.zeros(4, 4), "0.bias": torch.zeros(4)}, model)


def small_vit() -> nn.Module:
    return VisionTransformer(32, 16, 1, 2, 8, 12, num_classes=3)


def small_densenet() -> nn.Module:
    return DenseNet(4, (1, 1), 8, num_classes=3)


@pytest.mark.parametrize(
    ("build", "old"),
    [
        (small_vit, lambda name: re.sub(r"mlp\.([03])\.", lambda found: f"mlp.linear_{1 + int(found[1]) // 3}.", name)),
        (small_densenet, lambda name: re.sub(r"(denselayer\d\.(norm|conv))(\d)", r"\1.\3", name)),
    ],
)
def test_old_names_that_torchvision_renames_when_it_loads_are_known(
    build: Callable[[], nn.Module], old: Callable[[str], str]
) -> None:
    model = build()
    state = model.state_dict()
    files = {old(name): (value.dtype, tuple(value.shape)) for name, value in state.items()}
    expected = {old(name): name for name in state if old(name) != name}
    assert len(expected) >= 4
    assert renamed(model, files, state) == expected
    assert renamed(model, {**files, **dict.fromkeys(expected.values(), (torch.float32, (1,)))}, state) == {}, (
        "what is there already"
    )


def test_a_loader_is_asked_for_what_is_missing_alone() -> None:
    class Renames(Net):
        def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
            # A version of old called the body's first layer by the name of the head.
            state["body.0.weight"], state["scaled"] = state.pop("first"), state.pop("spare") * 2
            super()._load_from_state_dict(state, prefix, *rest)

    state = Net().state_dict()
    files = {{"body.0.weight": "first"}.get(name, name): value for name, value in state.items()}
    model = Renames()
    chain = capture(model, TensorSpec((4,), torch.float32))
    found = match(GivenTensors(files), chain, "net", loader=model)
    assert dict(found.names) == {**{name: name for name in state}, "body.0.weight": "first"}
    del files["first"]
    with pytest.raises(ConfigError, match=r"missing in the file: body\.0\.weight; give"):
        match(GivenTensors(files), chain, "net", loader=model)
    assert not any(tensor.is_meta for tensor in model.state_dict().values()), "the user's model stays as it is"


def test_weights_of_another_model_are_refused() -> None:
    text = "nothing in the state_dict that was given is of model net: it holds 'a', 'b', ..., and the model has 'body.0.weight',"
    with pytest.raises(ConfigError, match=re.escape(text)):
        matched({"a": torch.zeros(1), "b": torch.zeros(1)})


def test_what_is_taken_is_said_in_one_line() -> None:
    state = {"module." + name: value for name, value in Net(7).half().state_dict().items()}
    state |= {f"module.aux{number}": torch.zeros(1) for number in range(7)}
    assert describe_weights(matched(state).summary()) == (
        "pretrained: 8 tensors from the state_dict that was given; new, with random values: head.weight (3, 5), head.bias (3,); not in the "
        "model, left out: module.aux0, module.aux1, module.aux2, module.aux3 and 3 more; prefix 'module.' left off; 6 cast to the model's "
        "types"
    )
