"""Collation: samples padded as a loader's own function pads a batch, to the longest of all parts; what mixes samples is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from helpers.datasets import Pairs
from lowmem_pnn.errors import DataError
from lowmem_pnn.formats.collated import CollatedDataset, pad_alike
from lowmem_pnn.seeds import random_generators
from lowmem_pnn.sources.map_split import from_torch

LENGTHS = [3, 3, 5, 2, 7, 4, 7, 1] * 5
DATA = Pairs([(torch.arange(1.0, length + 1), number % 3) for number, length in enumerate(LENGTHS)])


def pads(items: list[Any], side: str = "right") -> Any:
    xs, labels = zip(*items, strict=True)
    lengths = torch.tensor([len(x) for x in xs])
    return (pad_sequence(xs, batch_first=True, padding_value=-1, padding_side=side), lengths), torch.tensor(labels)


def centres(items: list[Any]) -> Any:
    (x, lengths), labels = pads(items)
    return (x - x.mean(), lengths), labels


def reverses(items: list[Any]) -> Any:
    (x, lengths), labels = pads(items)
    return (x.roll(x.shape[1] - int(lengths.min()), 1), lengths), labels


@pytest.mark.parametrize("side", ["right", "left"])
def test_samples_are_padded_as_beside_the_longest(side: str) -> None:
    def collate(items: list[Any]) -> Any:
        return pads(items, side)

    dataset = CollatedDataset(DATA, collate, "a")
    assert dataset.pads
    (whole,) = DataLoader(DATA, batch_size=len(DATA), collate_fn=collate)
    for number, ((x, length), label) in enumerate(map(dataset.__getitem__, range(len(DATA)))):
        assert torch.equal(x, whole[0][0][number])
        assert (int(length), int(label)) == (LENGTHS[number], number % 3)
    assert dataset.padding_note == (
        "collate_fn pads samples to the longest of the data, (7,), not of each batch: losses are the same where masks, and labels that are left "
        "out, hide what is padded"
        + (
            "; it comes before the samples, so that positions which a model counts from there are others"
            if side == "left"
            else ""
        )
    )


def test_all_parts_are_padded_to_the_longest_of_all() -> None:
    train, val = (
        CollatedDataset(Pairs(items), pads, "a") for items in (DATA.items[:4], [(torch.ones(9), 0), (torch.ones(9), 1)])
    )
    assert (train.pads, val.pads) == (True, False)
    (note,) = pad_alike([train, val, None])
    assert "(9,)" in note
    assert [tuple(part[0][0][0].shape) for part in (train, val)] == [(9,), (9,)]
    alike = [CollatedDataset(Pairs(DATA.items[:2]), pads, "a")]
    assert (pad_alike(alike), alike[0].pads) == ((), False)


def test_few_that_are_shorter_are_padded_too() -> None:
    # As where texts are cut at a length: no evenly spaced one is shorter.
    items = [(torch.ones(3 if number == 29 else 5), 0) for number in range(100)]
    dataset = CollatedDataset(Pairs(items), pads, "a")
    assert dataset.pads
    (x, length), _ = dataset[29]
    assert (x.tolist(), int(length)) == ([1, 1, 1, -1, -1], 3)


class Noisy(Pairs):
    """Adds what is drawn at random to some samples, and may draw their lengths too."""

    def __init__(self, number: int, draws_lengths: bool = False) -> None:
        super().__init__(DATA.items)
        self.number, self.draws_lengths = number, draws_lengths

    def __getitem__(self, index: int) -> Any:
        x, label = super().__getitem__(index)
        if index != self.number:
            return x, label
        return (x + torch.rand(1))[: int(torch.randint(1, 9, ())) if self.draws_lengths else None], label


def test_what_samples_draw_follows_from_their_numbers() -> None:
    number = LENGTHS.index(7)  # the longest
    before = random_generators()
    one, other = (CollatedDataset(Noisy(number), pads, "a") for _ in range(2))
    assert random_generators() == before
    assert torch.equal(one.longest[0][0], other.longest[0][0])
    assert from_torch(one).is_random
    with pytest.raises(
        DataError, match=r"^a: sample 4 has another length whenever it is read \(.*\), so that it is not known to what"
    ):
        CollatedDataset(Noisy(number, draws_lengths=True), pads, "a")


@pytest.mark.parametrize("collate", [centres, reverses])
def test_more_than_padding_is_refused(collate: Any) -> None:
    with pytest.raises(DataError) as error:
        CollatedDataset(DATA, collate, "a")
    assert str(error.value) == (
        "a: collate_fn gives other values for two samples together than for each alone, beside padding; keep mixing, and draws at random, out "
        "of it, since each sample is collated by itself here"
    )


def test_collators_of_transformers_pad_with_their_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "a": 1, "b": 2, "c": 3}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    rows = [dict(tokenizer(text)) for text in ("a b", "c", "a b c a", "b b b")]
    for collator, extra in (
        (DataCollatorWithPadding(tokenizer), {"labels": 1}),
        (DataCollatorForLanguageModeling(tokenizer, mlm=False), {}),
    ):
        dataset = CollatedDataset(Pairs([{**row, **extra} for row in rows]), collator, "a")
        sample: dict[str, Tensor] = dataset[1]
        assert sample["input_ids"].tolist() == [3, 0, 0, 0]
        assert sample["attention_mask"].tolist() == [1, 0, 0, 0]
        assert sample["labels"].tolist() == (1 if extra else [3, -100, -100, -100])
