"""The index of a store: checksums of all shards, earlier versions, damage."""

import hashlib
import json
import os
import shutil
import zlib

import pytest
import safetensors.torch
import torch

from helpers.activation_stores import PLENTY, SAMPLE_BYTES, SPECS, label_lists, read, samples, write, write_kept, write_labelled
from helpers.tensors import bits
from lowmem_pnn.errors import CheckpointError
from lowmem_pnn.model.chain import TensorSpec
from lowmem_pnn.stores.activation_writer import ActivationWriter
from lowmem_pnn.stores.activations import ActivationStore
from lowmem_pnn.stores.tensor_file import TensorFile


def unsealed(path):
    """The content of an index, as versions wrote it that did not seal it."""
    content = json.loads(path.read_text())
    del content["sha256"]
    return {**content, "format": 2}


def test_default_shards_are_those_of_earlier_versions(tmp_path, pool):
    write(tmp_path / "a", 5, pool)
    with TensorFile.open(tmp_path / "a" / "00000.safetensors") as file:
        assert list(file.entries) == ["0", "1", "labels"]
    path = tmp_path / "a" / "index.json"
    content = unsealed(path)
    assert content.pop("kept_as") == "float32"
    path.write_text(json.dumps(content))
    assert ActivationStore.open(tmp_path / "a", verify=True).encoding == "float32"


def test_scales_are_in_the_checksum_and_their_absence_is_noticed(tmp_path, pool):
    specs = (TensorSpec((4, 16), torch.float32),)
    for folder in "ab":
        write_kept(tmp_path / folder, specs, 8, "int8", pool)
    shard = tmp_path / "a" / "00001.safetensors"
    with TensorFile.open(shard, writable=True) as file:
        scales = file.read("0.scales")
        file.write_from("0.scales", scales * 2)
    ActivationStore.open(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"a/00001\.safetensors' has CRC-32"):
        ActivationStore.open(tmp_path / "a", verify=True)
    path = tmp_path / "b" / "index.json"
    path.write_text(json.dumps({**unsealed(path), "kept_as": "bfloat16"}))
    text = r"holds int8 \(4, 4, 16\), float32 \(4, 4\), int64 \(4,\), the index says bfloat16 \(4, 4, 16\), int64 \(4,\);"
    with pytest.raises(CheckpointError, match=text):
        ActivationStore.open(tmp_path / "b")


def test_an_index_of_an_earlier_version_is_of_single_labels(tmp_path, pool):
    write(tmp_path / "a", 20, pool)
    path = tmp_path / "a" / "index.json"
    content = unsealed(path)
    del content["label_shape"]
    path.write_text(json.dumps(content))
    store = ActivationStore.open(tmp_path / "a", verify=True)
    assert store.labels.shape == ()
    assert label_lists(read(store, 20, pool)) == [list(range(20))]
    write_labelled(tmp_path / "b", 20, (5,), pool)
    path = tmp_path / "b" / "index.json"
    content = unsealed(path)
    del content["label_shape"]
    path.write_text(json.dumps(content))
    with pytest.raises(
        CheckpointError, match=r"holds float32 \(4,\), int64 \(4, 5\), the index says float32 \(4,\), int64 \(4,\);"
    ):
        ActivationStore.open(tmp_path / "b")


def test_shards_laid_out_by_others_are_read(tmp_path, pool):
    tensors, labels = samples(SPECS, 20)
    write(tmp_path / "a", 20, pool)
    index = tmp_path / "a" / "index.json"
    content = unsealed(index)
    for number, shard in enumerate(content["shards"]):
        path = tmp_path / "a" / shard["file"]
        safetensors.torch.save_file(safetensors.torch.load_file(path), path, {"shard": str(number)})
        del shard["crc32"]
        shard |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    index.write_text(json.dumps({**content, "format": 1}))
    for direct in (False, True):
        [(back, found)] = read(ActivationStore.open(tmp_path / "a", verify=True, direct=direct), 20, pool)
        assert found.tolist() == labels.tolist()
        assert [bits(tensor) for tensor in back] == [bits(tensor) for tensor in tensors]
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"a/00004\.safetensors' has sha256 [0-9a-f]{64}, the index says"):
        ActivationStore.open(tmp_path / "a", verify=True)


def damage(folder, kind):
    shard, other = folder / "00001.safetensors", folder / "00002.safetensors"
    if kind == "missing":
        shard.unlink()
    elif kind == "truncated":
        os.truncate(shard, shard.stat().st_size - 5)
    elif kind == "longer":
        os.truncate(shard, shard.stat().st_size + 5)
    elif kind == "swapped":
        shard.rename(folder / "x")
        other.rename(shard)
        (folder / "x").rename(other)
    elif kind == "zeroed":
        size = shard.stat().st_size
        os.truncate(shard, size - 40)
        os.truncate(shard, size)
    elif kind == "edited":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    else:
        layout = {"0": (torch.float16, (4, 3)), "1": (torch.bfloat16, (4, 2, 2)), "labels": (torch.int64, (4,))}
        shard.unlink()
        TensorFile.create(shard, layout, {"shard": "1"}).close()


@pytest.mark.parametrize(
    ("kind", "verify", "text"),
    [
        ("missing", False, "is missing"),
        ("truncated", False, r"has \d+ bytes, its header says \d+"),
        ("longer", False, r"has \d+ bytes, its header says \d+"),
        ("swapped", False, "holds shard 2 of a store, in the place of shard 1"),
        ("zeroed", True, "has CRC-32 [0-9a-f]{8}, the index says [0-9a-f]{8}"),
        ("edited", True, "has CRC-32 [0-9a-f]{8}, the index says [0-9a-f]{8}"),
        ("another", False, r"holds float16 \(4, 3\), bfloat16 \(4, 2, 2\), int64 \(4,\), the index says float32 \(4, 3\), "),
    ],
)
def test_a_damaged_shard_is_refused_by_name(tmp_path, pool, kind, verify, text):
    write(tmp_path / "a", 20, pool)
    damage(tmp_path / "a", kind)
    with pytest.raises(CheckpointError, match=r"a/00001\.safetensors' " + text) as caught:
        ActivationStore.open(tmp_path / "a", verify=verify)
    assert str(caught.value).endswith("; restore the run's folder from a copy, or start again with --overwrite")


@pytest.mark.parametrize("window_bytes", [0, 8 * SAMPLE_BYTES, PLENTY])
@pytest.mark.parametrize("kind", ["missing", "truncated", "swapped", "another"])
def test_a_shard_damaged_later_is_refused_when_it_is_read(tmp_path, pool, kind, window_bytes):
    write(tmp_path / "a", 20, pool)
    store = ActivationStore.open(tmp_path / "a")
    damage(tmp_path / "a", kind)
    with pytest.raises(CheckpointError, match=r"a/0000[12]\.safetensors'"):
        read(store, 3, pool, shuffle=True, window_bytes=window_bytes)
    assert store.cache is None


def test_shards_of_another_store_are_told_by_their_checksum(tmp_path, pool):
    write(tmp_path / "a", 20, pool)
    tensors, labels = samples(SPECS, 20, seed=1)
    with ActivationWriter(tmp_path / "b", SPECS, 20, 4 * SAMPLE_BYTES, pool) as writer:
        writer.append(tensors, labels)
    shutil.copy(tmp_path / "b" / "00003.safetensors", tmp_path / "a" / "00003.safetensors")
    with pytest.raises(CheckpointError, match=r"a/00003\.safetensors' has CRC-32"):
        ActivationStore.open(tmp_path / "a", verify=True)


@pytest.mark.parametrize(
    "change",
    [{"shard_samples": 21}, {"num_samples": 4}, {"format": 2}, {"format": 1}, {"more": 1}, {"kept_as": "int8"}, {"sha256": None}],
)
def test_a_change_of_a_sealed_index_is_noticed(tmp_path, pool, change):
    write(tmp_path / "a", 3, pool)  # a single shard, which contradicts no number of samples above its own
    path = tmp_path / "a" / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=r"a/index\.json' is damaged: its content does not match its checksum; restore"):
        ActivationStore.open(tmp_path / "a")


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda index: "{", "is no JSON"),
        (lambda index: [], "has format None, this version reads 3"),
        (lambda index: {**index, "format": 4}, "has format 4, this version reads 3"),
        (lambda index: {**index, "format": 3}, "is damaged: its content does not match its checksum"),
        (lambda index: {**index, "label_dtype": ["I64"]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "num_samples": 21}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "num_samples": "20"}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "shard_samples": 0}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "shard_samples": 5}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "shards": index["shards"][:-1]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "shards": index["shards"][::-1]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "shards": [{**shard, "crc32": None} for shard in index["shards"]]}, "contradicts itself"),
        (lambda index: {**index, "shards": [{**shard, "bytes": -1} for shard in index["shards"]]}, "contradicts itself"),
        (
            lambda index: {**index, "shards": [{**shard, "file": "/etc/passwd"} for shard in index["shards"]]},
            "contradicts itself",
        ),
        (lambda index: {**index, "shards": 3}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "tensors": [{"dtype": "F33", "shape": [3]}]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "tensors": [{"dtype": ["F32"], "shape": [3]}]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "tensors": [{"dtype": "F32", "shape": [-3]}]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "tensors": [{"dtype": "F32"}]}, "contradicts itself or lacks a part"),
        (lambda index: {key: index[key] for key in index if key != "num_samples"}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "label_shape": [-1]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "label_shape": ["3"]}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "label_shape": 3}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "kept_as": "int4"}, "contradicts itself or lacks a part"),
        (lambda index: {**index, "kept_as": ["int8"]}, "contradicts itself or lacks a part"),
    ],
)
def test_a_damaged_index_is_refused_by_name(tmp_path, pool, edit, text):
    write(tmp_path / "a", 20, pool)
    path = tmp_path / "a" / "index.json"
    content = edit(unsealed(path))
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(CheckpointError, match=r"a/index\.json' " + text) as caught:
        ActivationStore.open(tmp_path / "a")
    assert str(caught.value).endswith("; restore the run's folder from a copy, or start again with --overwrite")


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda index: {**index, "label_shape": [2]}, r"00000.safetensors' holds .*, int64 \(4,\), the index .* int64 \(4, 2\);"),
        (lambda index: {**index, "tensors": index["tensors"][:1]}, r"00000.safetensors' holds float32 \(4, 3\), bfloat16"),
        (
            lambda index: {**index, "shards": [{**shard, "bytes": 5} for shard in index["shards"]]},
            r"00000.safetensors' has \d+ bytes, the index says 5;",
        ),
    ],
)
def test_an_index_that_contradicts_the_shards_is_refused(tmp_path, pool, edit, text):
    write(tmp_path / "a", 20, pool)
    path = tmp_path / "a" / "index.json"
    path.write_text(json.dumps(edit(unsealed(path))))
    with pytest.raises(CheckpointError, match=text):
        ActivationStore.open(tmp_path / "a")


def test_the_index_names_the_checksum_of_every_shard(tmp_path, pool):
    write(tmp_path / "a", 10, pool)
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [4, 4, 2]
    for shard in index["shards"]:
        assert int(shard["crc32"], 16) == zlib.crc32((tmp_path / "a" / shard["file"]).read_bytes())
        assert "sha256" not in shard
