"""Tokenizers: what is read of a folder, and what is refused."""

import json
from pathlib import Path

import pytest

from helpers.language import tokenizer_json, write_tokenizer
from lowmem_pnn.errors import ConfigError
from lowmem_pnn.language.tokenizer import ByteTokenizer, open_tokenizer


def test_bytes_come_back() -> None:
    tokenizer = open_tokenizer("bytes")
    text = "ab ä€\n"
    [ids] = tokenizer.encode([text])
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids.tolist()) == text
    starts = tokenizer.encode_with_starts("aä€b")[1]
    assert starts.tolist() == [0, 1, 1, 2, 2, 2, 3]


def test_a_folder_has_begin_end_padding_and_template(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path, begins=True, template="{{ 1 }}")))
    assert (tokenizer.size, tokenizer.begin, tokenizer.end, tokenizer.padding) == (279, (2,), 0, 1)
    assert tokenizer.chat_template == "{{ 1 }}"
    assert tokenizer.special_tokens == {"bos_token": "<begin>", "eos_token": "<end>", "pad_token": "<pad>"}
    ids = tokenizer.encode(["the cat", "dog"])
    assert [tokenizer.decode([2, *one.tolist(), 0]) for one in ids] == ["the cat", "dog"]


def test_a_begin_that_only_the_settings_ask_for(tmp_path: Path) -> None:
    assert open_tokenizer(str(write_tokenizer(tmp_path / "a", add_bos_token=True))).begin == (2,)
    assert open_tokenizer(str(write_tokenizer(tmp_path / "b"))).begin == ()


def test_a_file_alone_has_the_usual_end(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(tokenizer_json().replace("<end>", "</s>"))
    tokenizer = open_tokenizer(str(file))
    assert (tokenizer.end, tokenizer.padding, tokenizer.chat_template) == (0, 0, None)


def test_the_template_of_older_folders(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert open_tokenizer(str(write_tokenizer(tmp_path / "a", chat_template="z"))).chat_template == "z"
    assert open_tokenizer(str(write_tokenizer(tmp_path / "b", chat_template=templates))).chat_template == "y"


def test_ends_are_those_that_the_models_files_name_too(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    for name, settings, ends in (
        ("tokenizer_config.json", {"eos_token": "<end>"}, {0}),
        ("config.json", {"text_config": {"eos_token_id": 7}}, {0, 7}),
        ("config.json", {"eos_token_id": 5}, {0, 5}),
        ("generation_config.json", {"eos_token_id": None}, {0, 5}),
        ("generation_config.json", {"eos_token_id": [5, 9]}, {0, 5, 9}),
    ):
        (tmp_path / name).write_text(json.dumps(settings))
        assert open_tokenizer(str(tmp_path)).ends == ends
    assert open_tokenizer("bytes").ends == frozenset()


def test_offsets_are_of_characters(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(write_tokenizer(tmp_path)))
    ids, starts = tokenizer.encode_with_starts("ä the")
    assert tokenizer.decode(ids.tolist()) == "ä the"
    assert starts.tolist()[0] == 0
    assert starts.tolist()[-1] in (1, 2, 3, 4)
    assert len(ids) == len(starts)


def test_halves_of_surrogate_pairs_are_no_fault(tmp_path: Path) -> None:
    for tokenizer in (open_tokenizer(str(write_tokenizer(tmp_path))), ByteTokenizer()):
        assert tokenizer.decode(tokenizer.encode([json.loads('"a\\ud800"')])[0].tolist()) == "a?"


def test_fingerprints_differ_with_what_is_made(tmp_path: Path) -> None:
    prints = {
        open_tokenizer(str(write_tokenizer(tmp_path / name, **options))).fingerprint  # type: ignore[arg-type]
        for name, options in {"a": {}, "b": {"begins": True}, "c": {"template": "x"}, "d": {"eos_token": "<pad>"}}.items()
    }
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "is no tokenizer: "),
        ("{}", "is no tokenizer: "),
        ("no json", "is no tokenizer: "),
        ("[1, 2]", "is no tokenizer: "),
    ],
)
def test_a_file_that_is_no_tokenizer(content: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        open_tokenizer(str(file))
    assert f"--tokenizer {file} {text}" in str(error.value)
    assert str(error.value).endswith("; give a tokenizer.json, or bytes")
    assert "\n" not in str(error.value)


def test_no_such_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no such file or folder; give a tokenizer.json, a folder with one, or bytes"):
        open_tokenizer(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"is a folder without tokenizer.json; give the folder of a tokenizer"):
        open_tokenizer(str(tmp_path))
    (write_tokenizer(tmp_path / "a") / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json cannot be read: JSONDecodeError"):
        open_tokenizer(str(tmp_path / "a"))
    (tmp_path / "a" / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer_config.json holds a list; give an object of settings"):
        open_tokenizer(str(tmp_path / "a"))


def test_a_tokenizer_of_another_alphabet_has_its_begin_and_end(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"[CLS]": 0, "[SEP]": 1, "G": 2, "T": 3}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    tokenizer.save(str(tmp_path / "a.json"))
    found = open_tokenizer(str(tmp_path / "a.json"))
    assert (found.begin, found.after, found.end) == ((0,), (1,), 1)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "removed")
    tokenizer.model = models.BPE(vocab={"[CLS]": 0, "[SEP]": 1}, merges=[])
    tokenizer.save(str(tmp_path / "b.json"))
    with pytest.raises(
        ConfigError, match=r"b.json makes no token of the texts of its own tokens, .*; give one that was trained$"
    ):
        open_tokenizer(str(tmp_path / "b.json"))
