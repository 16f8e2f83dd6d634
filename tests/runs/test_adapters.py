"""Runs in which adapters learn beside a frozen base: the same as plain PyTorch with peft, however the model is cut, and resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowmem_pnn
from helpers.displays import StopsAt
from helpers.exact_runs import COMMON, fit
from helpers.plainloops import train_by_backprop, train_by_exact
from helpers.small_networks import small_mlp, vectors
from lowmem_pnn.adapters.prepared_model import prepared
from lowmem_pnn.config.configure import configure
from lowmem_pnn.errors import ConfigError, Stopped
from lowmem_pnn.quantization.stored_weights import StoredForm

LORA: dict[str, Any] = {"lora": "r=4,alpha=8,targets=0+2,dropout=0.1"}


def wide_mlp(classes: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, classes))


def with_adapters(**options: Any) -> Any:
    config = configure(max_gpu_mem="1GB", model="python:model", data="python:data", **options)
    return lambda: prepared(wide_mlp(), config)


def assert_same(file: str, model: nn.Module) -> None:
    expected, found = model.state_dict(), load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize(
    ("cuts", "options"),
    [
        (None, {}),
        ("1", {"frozen_dtype": "bf16"}),
        ("1,2", {}),
        pytest.param("1,2", {}, marks=pytest.mark.resident, id="1,2-resident"),
    ],
)
def test_a_run_is_the_same_as_plain_pytorch_with_peft(cuts: str | None, options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"], lora_dropout=0.1)

    def plain() -> nn.Module:
        model = small_mlp()
        if options:
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data = module.weight.data.bfloat16().float()
        learns: nn.Module = peft.get_peft_model(model, settings)
        return learns

    result = fit(
        small_mlp, vectors(), tmp_path / "run", compare=True, **LORA, **options, **COMMON, **({"cuts": cuts} if cuts else {})
    )
    expected = train_by_exact(plain, vectors(), **COMMON)
    state = {
        name.removeprefix("base_model.model.").replace(".default.weight", "").replace(".base_layer", ""): tensor
        for name, tensor in expected.model.state_dict().items()
    }
    found = load_file(result.weights_file)
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name]), name
    assert result.train_loss == expected.train_loss
    assert result.compared == "yes"


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("bf16", {"cuts": "1", "precision": "bf16"}),
        ("bf16", {}),
        ("int8", {"cuts": "1,2"}),
        pytest.param("int8", {"cuts": "1,2"}, marks=pytest.mark.resident, id="int8-resident"),
        ("nf4", {"precision": "bf16"}),
    ],
)
def test_a_base_in_a_smaller_type_is_trained_on_as_in_plain_pytorch(form: str, options: dict[str, Any], tmp_path: Path) -> None:
    result = fit(wide_mlp, vectors(), tmp_path / "run", frozen_dtype=form, **LORA, **options, **COMMON)
    plain = {**COMMON, **({"precision": "bf16"} if "precision" in options else {})}
    assert_same(result.weights_file, train_by_exact(with_adapters(**LORA, frozen_dtype=form), vectors(), **plain).model)


def test_backprop_has_adapters_too(tmp_path: Path) -> None:
    result = fit(wide_mlp, vectors(), tmp_path / "run", method="backprop", frozen_dtype="int8", **LORA, **COMMON)
    assert_same(result.weights_file, train_by_backprop(with_adapters(**LORA, frozen_dtype="int8"), vectors(), **COMMON))


def test_a_run_with_adapters_is_resumed(tmp_path: Path) -> None:
    options = {**LORA, **COMMON, "frozen_dtype": "nf4", "cuts": "1", "commit_every": 0}
    with pytest.raises(Stopped):
        fit(wide_mlp, vectors(), tmp_path / "run", display=StopsAt(8), **options)
    result = fit(wide_mlp, vectors(), tmp_path / "run", resume=True, **options)
    assert_same(result.weights_file, train_by_exact(with_adapters(**LORA, frozen_dtype="nf4"), vectors(), **COMMON).model)


def test_frozen_weights_may_be_kept_smaller_without_adapters(tmp_path: Path) -> None:
    options = {"freeze": "0.*", "frozen_dtype": "int8"}
    result = fit(wide_mlp, vectors(), tmp_path / "run", **options, **COMMON, cuts="1")
    assert_same(result.weights_file, train_by_exact(with_adapters(**options), vectors(), **COMMON).model)


def test_a_head_for_other_classes_learns_whole_and_is_resumed(tmp_path: Path) -> None:
    torch.manual_seed(9)
    weights = wide_mlp(7).state_dict()
    options = {"lora": "r=2,targets=0", "frozen_dtype": "nf4", "weights": weights, **COMMON, "commit_every": 0}
    whole = fit(wide_mlp, vectors(), tmp_path / "whole", **options)
    assert whole.weights["new"] == ["4.weight (4, 64)", "4.bias (4,)"]
    assert whole.notes[0] == "adapters of rank 2, alpha 8, on 1 linear layer (0): 152 values; 4 learns whole"
    with pytest.raises(Stopped):
        fit(wide_mlp, vectors(), tmp_path / "run", display=StopsAt(7), **options)
    # As it was asked for, so that the same command goes on with the run.
    assert json.loads((tmp_path / "run" / "config.json").read_text())["modules_to_save"] is None
    resumed = fit(wide_mlp, vectors(), tmp_path / "run", resume=True, **options)
    found, expected = load_file(resumed.weights_file), load_file(whole.weights_file)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    torch.manual_seed(COMMON["seed"])
    assert not torch.equal(expected["4.weight"], wide_mlp().state_dict()["4.weight"])
    stored = StoredForm("nf4", (64, 64), torch.float32).encode(weights["2.weight"])
    assert torch.equal(expected["2.weight"], stored[""])
    assert torch.equal(expected["2.weight_scale"], stored["_scale"])
    with pytest.raises(
        ConfigError, match=r"^--modules-to-save 2: '4' is new, and would never learn; name it too, or leave the opt"
    ):
        fit(wide_mlp, vectors(), tmp_path / "other", modules_to_save="2", **options)


def test_a_plan_counts_the_smaller_types_and_says_them() -> None:
    def plan(form: str) -> Any:
        data = vectors()
        return lowmem_pnn.plan(
            wide_mlp, data, max_gpu_mem="100MB", device="cpu", timing=False, lora="r=4,targets=0+2", frozen_dtype=form
        )

    plans = {form: plan(form) for form in ("fp32", "int8", "nf4")}
    sizes = {form: report.training_state_bytes for form, report in plans.items()}
    inner, head = 64 * 12 + 64 * 64, 4 * 64
    assert sizes["fp32"] - sizes["int8"] == 3 * inner - 4 * 128 + 2 * head
    assert sizes["fp32"] - sizes["nf4"] == 4 * inner - inner // 2 - 4 * inner // 64 + 2 * head
    assert len({sum(part["params"] for part in report.partitions) for report in plans.values()}) == 1
    assert plans["nf4"].notes[:2] == [
        "adapters of rank 4, alpha 8, on 2 linear layers (0, 2): 816 values",
        "frozen weights are kept as 4,864 values in nf4, 256 values in bf16, and cast layer by layer to what is computed in",
    ]


def test_a_run_with_adapters_is_evaluated_as_it_was_tested(tmp_path: Path) -> None:
    options = {"method": "exact", "max_gpu_mem": "100MB", "device": "cpu", "train_limit": 200}
    result = lowmem_pnn.fit(
        "mlp:64-80-10", "digits", workdir=tmp_path / "run", epochs=1, lora="r=2", frozen_dtype="nf4", **options
    )
    assert lowmem_pnn.evaluate(tmp_path / "run")["test_loss"] == result.test_loss


def test_peft_reads_the_adapter_that_a_run_leaves(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    result = fit(wide_mlp, vectors(), tmp_path / "run", lora="r=4,alpha=8,targets=0+2", modules_to_save="4", **COMMON)
    assert result.adapter == str(tmp_path / "run" / "adapter")
    assert f"adapter: {result.adapter}" in str(result)
    torch.manual_seed(COMMON["seed"])
    base = wide_mlp()
    ours = lowmem_pnn.load(result)
    theirs = peft.PeftModel.from_pretrained(base, result.adapter).eval()
    inputs = vectors()[0][:7]
    assert torch.equal(theirs(inputs), ours(inputs))
    torch.manual_seed(COMMON["seed"])
    assert not torch.equal(wide_mlp()(inputs), ours(inputs))
    # What peft itself writes has the same tensors under the same names.
    theirs.save_pretrained(tmp_path / "again")
    again, own = (load_file(f"{folder}/adapter_model.safetensors") for folder in (tmp_path / "again", result.adapter))
    assert again.keys() == own.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in own.items())


def test_adapters_are_merged_into_the_models_own_weights(tmp_path: Path) -> None:
    result = fit(wide_mlp, vectors(), tmp_path / "run", frozen_dtype="nf4", **LORA, **COMMON)
    report = lowmem_pnn.export(result, merge=True)
    assert report["file"] == str(tmp_path / "run" / "export" / "model.safetensors")
    plain = lowmem_pnn.load_weights(wide_mlp(), report["file"])
    inputs = vectors()[0][:7]
    assert torch.allclose(plain(inputs), lowmem_pnn.load(result)(inputs), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"^--merge writes safetensors, and not onnx; leave --to out$"):
        lowmem_pnn.export(result, merge=True, to="onnx")


def test_a_run_without_adapters_has_nothing_to_merge_and_no_folder(tmp_path: Path) -> None:
    result = fit(wide_mlp, vectors(), tmp_path / "run", lora="r=2,targets=0", **{**COMMON, "epochs": 1})
    assert (tmp_path / "run" / "adapter").is_dir()
    (tmp_path / "run" / "adapter" / "notes.txt").write_text("mine")
    result = fit(wide_mlp, vectors(), tmp_path / "run", overwrite=True, **{**COMMON, "epochs": 1})
    assert result.adapter is None
    assert [path.name for path in (tmp_path / "run" / "adapter").iterdir()] == ["notes.txt"]
    with pytest.raises(ConfigError, match=r"--merge has no effect here: the run in .* has no adapters and no stored weights"):
        lowmem_pnn.export(result, merge=True)


def test_a_new_head_is_evaluated_and_handed_on_as_it_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(9)
    options = {"lora": "r=2,targets=0", "frozen_dtype": "nf4", "weights": wide_mlp(7).state_dict(), **COMMON, "epochs": 1}
    result = fit(wide_mlp, vectors(), tmp_path / "run", **options)
    trained = load_file(result.weights_file)
    assert torch.equal(lowmem_pnn.load(result)[4].weight, trained["4.weight"])
    assert torch.equal(load_file(f"{result.adapter}/adapter_model.safetensors")["base_model.model.4.weight"], trained["4.weight"])
    assert lowmem_pnn.predict(result, vectors()[0][:3])["scores"].shape == (3, 4)
