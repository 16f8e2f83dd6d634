"""What people bring that could go wrong without a word: it trains as plain PyTorch does, or ends in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import lowmem_pnn
from helpers.commands import lowmem_pnn as command
from helpers.exact_runs import COMMON, check_equal, fit
from helpers.small_networks import images
from lowmem_pnn.errors import CaptureError

SIDE32 = images(side=32)


def vit(side: int) -> Callable[[], nn.Module]:
    return lambda: VisionTransformer(side, 16, 2, 2, 8, 16, num_classes=4)


@pytest.mark.parametrize("method", ["exact", "pnn"])
def test_a_vit_of_larger_images_says_so(method: str, tmp_path: Path) -> None:
    with pytest.raises(
        CaptureError, match=r"does not run on samples of .3, 32, 32. float32 .*: Wrong image height! Expected 224 but got 32"
    ):
        fit(vit(224), SIDE32, tmp_path / "run", **COMMON, method=method)
    assert not (tmp_path / "run").exists()


def test_a_vit_of_small_images_is_as_in_plain_pytorch(tmp_path: Path) -> None:
    check_equal(vit(32), SIDE32, tmp_path / "run", **COMMON, cuts="2")


def test_vit_b_16_is_told_the_size_of_small_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(4):
        (tmp_path / "photos" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "photos" / str(number % 2) / f"{number}.png")
    asked = "plan --max-gpu-mem 2GB --model vit_b_16 --data imagefolder:photos --image-size 32 --no-timing --device cpu"
    refused = command(asked)
    assert (refused.code, refused.err.count("\n")) == (3, 1)
    assert "Wrong image height! Expected 224 but got 32!" in refused.fault


class Rearranges(nn.Module):
    """Calls a function of einops in its own forward, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 8), nn.Linear(8 * 96, 4)

    def forward(self, x: Tensor) -> Tensor:
        import einops

        rearranged = einops.rearrange(self.first(x), "b c h w -> b (c h w)")
        out: Tensor = self.last(rearranged)
        return out


class Wraps(nn.Module):
    """Has such a model inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Rearranges(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.inner(x).relu())
        return out


@pytest.mark.parametrize(("build", "partitions"), [(Rearranges, 1), (Wraps, 2)])
def test_a_function_of_einops_is_as_in_plain_pytorch(build: type[nn.Module], partitions: int, tmp_path: Path) -> None:
    pytest.importorskip("einops")
    check_equal(build, SIDE32, tmp_path / "run", **COMMON, partitions=partitions)


def test_a_decoder_that_sees_later_tokens_is_not_trained_on_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes: dict[str, Any] = {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8,
    }  # fmt: skip
    config = transformers.Gemma3TextConfig(**sizes, use_bidirectional_attention=True).to_dict()
    Path("config.json").write_text(json.dumps({**config, "architectures": ["Gemma3ForCausalLM"]}))
    Path("words.txt").write_text("words and words " * 100)
    asked = "plan --max-gpu-mem 300MB --model hf:config.json --data text:words.txt --tokenizer bytes --context 16 --no-timing --device cpu"
    refused = command(asked)
    assert (refused.code, refused.err.count("\n")) == (3, 1)
    assert "sees the tokens after each token, which --task causal-lm is to learn" in refused.fault
    advice = refused.fault.rpartition("give ")[2]
    assert advice == "--model-arg use_bidirectional_attention=false"
    assert command(f"{asked} {advice}").code == 0, "the advice works"


class Tells(lowmem_pnn.Display):
    def __init__(self) -> None:
        self.told: list[str] = []

    def message(self, text: str) -> None:
        self.told.append(text)


@pytest.mark.parametrize(
    "more", [{}, {"keep_weights": "best", "early_stop": 1}, {"eval_every": 2}], ids=["last", "best", "steps"]
)
def test_an_infinite_validation_loss_is_said_and_trains_on(more: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(40, 5)
    beyond = x[:9, 0].clone()
    beyond[2] = 1e30  # whose square is no number of float32
    display = Tells()
    build = lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 1))  # noqa: E731
    options = {"epochs": 2, "batch_size": 8, "task": "regression"}
    result = fit(build, (x, x[:, 0]), tmp_path / "run", val=(x[:9], beyond), display=display, **options, **more)
    assert result.val_loss is None
    assert result.train_loss is not None
    assert result.history["val_loss"] == [None] * (1 if "early_stop" in more else 2)
    assert "the validation loss is inf in epoch 1; training goes on" in display.told
    assert "val loss is inf, and left out of the result" in display.told
    json.loads((tmp_path / "run" / "result.json").read_text(), parse_constant=pytest.fail)  # no Infinity, which is no JSON
    if "early_stop" in more:
        assert "training ends after epoch 1: val_loss was never a finite number" in display.told
        assert (result.best_epoch, result.weights_of) == (None, "last")
    assert not [text for text in display.told if text.endswith(": ")]
