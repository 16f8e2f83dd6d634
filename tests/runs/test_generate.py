"""Generation by finished runs: what a plain loop over the loaded model says, however the model is cut, and whatever stands beside it."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lowmem_pnn
from helpers.commands import lowmem_pnn as command
from helpers.displays import Told
from helpers.exact_runs import fit
from helpers.language import write_jsonl, write_tokenizer
from helpers.small_networks import small_gpt, small_mlp, tokens, vectors
from lowmem_pnn.errors import BudgetError, ConfigError
from lowmem_pnn.evaluation import cached_model, generation
from lowmem_pnn.inference import ways_to_generate
from lowmem_pnn.inference.generate import generate_run
from lowmem_pnn.language.sampling import Sampling
from lowmem_pnn.language.tokenizer import open_tokenizer
from lowmem_pnn.reporting.result import Result

GPT = functools.partial(small_gpt, tied=True, context=24)
KeepingGpt = cached_model._CachedGpt
OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 10, "lr": 0.01, "seed": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A run in three partitions, on rows of 24 tokens."""
    return fit(GPT, tokens(length=24), tmp_path_factory.mktemp("gpt") / "run", cuts="1,3", **OPTIONS)


def plain_greedy(score: Callable[[Tensor], Tensor], prompt: Sequence[int], count: int, context: int) -> list[int]:
    """The loop that people write."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(score(torch.tensor([ids[-context:]]))[0, -1].argmax()))
    return ids[len(prompt) :]


def stages(told: Told) -> list[str]:
    """The ways that were taken."""
    return [text.partition("at most, ")[2].partition(":")[0] for text in told.stages if "at most, " in text]


CACHED = "by the whole model, which keeps keys and values of the tokens before"


def test_it_says_what_a_plain_loop_says(trained: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = lowmem_pnn.load(trained, GPT), Told()
    prompts = [[3, 8], [1, 6, 11, 3, 8, 0, 5], [12]]
    said = lowmem_pnn.generate(trained, prompts, max_new_tokens=30, display=told)
    # Longer than the context too: of what is longer the last tokens are seen.
    assert said == [plain_greedy(model, prompt, 30, 24) for prompt in prompts]
    assert lowmem_pnn.generate(trained, np.array(prompts[1]), max_new_tokens=30) == said[1]
    # As a whole, where its keys and values do not fit; in partitions, where it does not.
    monkeypatch.setattr(ways_to_generate, "why_not_cached", lambda *given: "it is not to be")
    assert trained.generate([prompts[2]], max_new_tokens=30, max_gpu_mem="50MB", display=told) == [said[2]]
    monkeypatch.setattr(ways_to_generate, "weight_bytes", lambda workload: 1 << 40)
    assert lowmem_pnn.generate(trained, prompts, max_new_tokens=30, display=told) == said
    assert stages(told) == [
        CACHED,
        *(f"by a forward over rows of 24 for each ({parts})" for parts in ("1 partition", "3 partitions")),
    ]


class Forgets(KeepingGpt):
    """Forgets what was before."""

    def go_on(self, ids: Tensor) -> Tensor:
        return self.begin(ids)


class Differs(KeepingGpt):
    """Keeps all, and says something else than what was trained."""

    def begin(self, ids: Tensor, source: Tensor | None = None) -> Tensor:
        return -super().begin(ids, source)

    def go_on(self, ids: Tensor) -> Tensor:
        return -super().go_on(ids)


@pytest.mark.parametrize("kind", [Forgets, Differs])
def test_where_the_models_own_cache_fails_it_goes_on_without(
    kind: type[KeepingGpt], trained: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, expected = Told(), lowmem_pnn.generate(trained, [3, 8, 1], max_new_tokens=5)
    monkeypatch.setattr(cached_model, "_CachedGpt", kind)
    assert lowmem_pnn.generate(trained, [3, 8, 1], max_new_tokens=5, display=told) == expected
    assert stages(told) == [CACHED, "by a forward over rows of 24 for each (1 partition)"]
    assert told.messages[0] == "not so, for with the keys and values that the model keeps its scores are others than without"


def test_what_is_kept_is_compared_with_a_forward_of_its_own_where_whole_rows_do_not_fit(
    trained: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*given: Any) -> Any:
        raise BudgetError("memory ran out in a row")

    told, expected = Told(), lowmem_pnn.generate(trained, [3], max_new_tokens=5)
    monkeypatch.setattr(generation.PartitionScorer, "scores", refuses)
    assert lowmem_pnn.generate(trained, [3], max_new_tokens=5, display=told) == expected
    assert stages(told) == [CACHED]


def test_what_is_drawn_follows_from_the_seed_alone(trained: Result) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "top_k": 8, "seed": 5}
    first = lowmem_pnn.generate(trained, [[3, 8], [3, 8]], **options)
    assert first[0] != first[1]
    assert lowmem_pnn.generate(trained, [[3, 8], [3, 8], [1]], **options)[:2] == first
    assert lowmem_pnn.generate(trained, [[3, 8]], **{**options, "seed": 6}) != first[:1]


def test_partitions_change_nothing(trained: Result, tmp_path: Path) -> None:
    whole = fit(GPT, tokens(length=24), tmp_path / "run", method="backprop", **OPTIONS)
    assert len(whole.partitions) == 1
    assert lowmem_pnn.generate(whole, [[3, 8], [5]], max_new_tokens=9) == lowmem_pnn.generate(
        trained, [[3, 8], [5]], max_new_tokens=9
    )


class Decoder(nn.Module):
    """Takes a mask, and says what comes after the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(279, 4), nn.Linear(4, 279)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        scores: Tensor = self.head(self.embedding(input_ids) * attention_mask[..., None])
        return scores


def test_texts_by_a_tokenizer_end_where_the_model_says_so(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer", begins=True)
    data = f"jsonl:{write_jsonl(tmp_path / 'a.jsonl', [{'prompt': 'the', 'completion': ' cat'}] * 12)}"
    result = fit(Decoder, data, tmp_path / "run", tokenizer=folder, context=8, epochs=60, lr=0.1, val_fraction=0.1)
    model, reader = lowmem_pnn.load(result, Decoder), open_tokenizer(str(folder))
    prompts, expected = ["the", "a dog"], []
    for prompt in prompts:
        begun = [2, *reader.encode([prompt])[0].tolist()]
        ids = plain_greedy(lambda ids: model(ids, torch.ones_like(ids)), begun, 20, 8)
        expected.append(reader.decode(ids[: ids.index(0)] if 0 in ids else ids))
    assert lowmem_pnn.generate(result, prompts, max_new_tokens=20) == expected
    said = generate_run(tmp_path / "run", prompts, max_new_tokens=20, sampling=Sampling(), model=Decoder)
    assert (said[0].text, said[0].ended) == (" cat", "end")
    assert all(0 not in one.tokens for one in said)


def test_the_command_prints_texts_or_json(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abcdefgh" * 200)
    run = tmp_path / "run"
    arguments = (
        "--max-gpu-mem 100MB --device cpu --model gpt:layers=1,width=16,heads=2,context=16 --method exact --epochs 30 --lr 0.01"
    )
    assert command(f"fit {arguments} --data text:{tmp_path / 'text'} --workdir {run} --quiet --batch-size 16").code == 0
    shown = command(f"generate {run} --prompt abc --prompt fgha --max-new-tokens 4 --quiet")
    assert (shown.code, shown.out) == (0, "abcdefg\n\nfghabcde\n")
    [said] = json.loads(command(f"generate {run} --prompt abc --max-new-tokens 3 --quiet --json").out)
    assert said == {"prompt": "abc", "text": "def", "tokens": [100, 101, 102], "ended": "length"}


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (
            [[3, 13]],
            {},
            r"^prompt 1 has token 13, and the model knows 13 tokens, from 0; give the tokenizer that it was trained with$",
        ),
        ([[3], []], {}, r"^prompt 2 has no token to go on from; give some text$"),
        ([], {}, r"^there is no prompt; give one or more texts to go on with$"),
        ([[3]], {"max_new_tokens": 0}, r"^--max-new-tokens 0 says nothing; give a number from 1$"),
        ([[3], 5], {}, r"^prompt 2 is neither text nor tokens; give whole numbers, from 0$"),
        (3, {}, r"^prompts are of type int; give a text, its tokens, or a list of such$"),
        (np.array(["abc", "d"]), {}, r"^the data of the run in .* is tokens as numbers; give their tokenizer"),
        (["abc"], {}, r"^the data of the run in .* is tokens as numbers; give their tokenizer: --tokenizer DIR\|FILE\|bytes$"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(trained: Result, prompts: Any, options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lowmem_pnn.generate(trained, prompts, **options)


def test_other_models_are_refused(tmp_path: Path) -> None:
    result = fit(small_mlp, vectors(), tmp_path / "run", epochs=1)
    with pytest.raises(ConfigError, match=r"^the run in .* predicts no tokens that come next .*; give predict$"):
        lowmem_pnn.generate(result, [[1]])
