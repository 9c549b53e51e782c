"""Reading shards and their index: exact about good files, calm about any bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from checkpoint_tools.files.checksums import ChecksumWriter, checksum
from checkpoint_tools.hf.read import HFCheckpoint
from checkpoint_tools.hf.write import plan_shards, write_shard
from checkpoint_tools.table.transforms import Box, LazyTensor, split_rows
from qwen35_mcore.errors import CheckpointError
from tests.helpers.kinds import examples

FUZZ = examples(150, suppress_health_check=[HealthCheck.function_scoped_fixture])
junk_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "dtype", "shape", "data_offsets", "weight_map", "__metadata__"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "BOOL", "F64", "X"]) | junk_json,
        "shape": st.lists(st.integers(-1, 4) | st.just(2**62), max_size=3) | junk_json,
        "data_offsets": st.lists(st.integers(-2, 40) | st.just(2**63), max_size=3) | junk_json,
    }
)


def read_bytes(folder: Path, content: bytes) -> None:
    """Read the bytes as a shard; only a CheckpointError may come out."""
    path = folder / "model.safetensors"
    path.write_bytes(content)
    try:
        hf = HFCheckpoint(folder)
    except CheckpointError:
        return
    tensors = hf.lazy(hf.tensors)
    assert sum(tensor.nbytes for tensor in tensors) <= len(content)
    for tensor in tensors:
        list(tensor.pieces())


@FUZZ
@given(content=st.binary(max_size=200))
def test_any_bytes_as_a_shard(tmp_path: Path, content: bytes) -> None:
    read_bytes(tmp_path, content)


@FUZZ
@given(
    header=st.dictionaries(st.text(max_size=4), entries | junk_json, max_size=3),
    size=st.integers(0, 80),
)
def test_any_json_as_a_header(tmp_path: Path, header: Any, size: int) -> None:
    content = json.dumps(header).encode()
    read_bytes(tmp_path, struct.pack("<Q", len(content)) + content + bytes(size))


@FUZZ
@given(data=st.data())
def test_a_good_shard_with_one_byte_changed(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "good.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4).bfloat16()}, path)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    read_bytes(tmp_path, bytes(content))


@FUZZ
@given(index=junk_json | st.builds(lambda m: {"weight_map": m}, junk_json))
def test_any_json_as_an_index(tmp_path: Path, index: Any) -> None:
    folder = tmp_path / "indexed"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        HFCheckpoint(folder)


@FUZZ
@given(content=st.binary(max_size=60))
def test_any_bytes_as_an_index(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000])
def test_json_that_exhausts_a_naive_parser(tmp_path: Path, content: bytes) -> None:
    read_bytes(tmp_path, struct.pack("<Q", len(content)) + content)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "", "x" * 300, 3])
def test_an_index_cannot_point_outside_its_folder(tmp_path: Path, name: Any) -> None:
    index = {"weight_map": {"a": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no file name"):
        HFCheckpoint(tmp_path)


@pytest.mark.parametrize("second", [[0, 1], [2, 3]])
def test_tensors_that_overlap_or_leave_a_hole(tmp_path: Path, second: list[int]) -> None:
    entry = {"dtype": "U8", "shape": [1]}
    header = json.dumps(
        {"a": entry | {"data_offsets": [0, 1]}, "b": entry | {"data_offsets": second}}
    ).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(second[1]))
    with pytest.raises(CheckpointError, match="cannot use a checkpoint file"):
        HFCheckpoint(tmp_path)


def test_what_we_write_safetensors_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {
        "byte": torch.arange(3, dtype=torch.uint8),
        "wide": torch.randn(5, 7, dtype=torch.float64),
        "half": torch.randn(4, 2).bfloat16(),
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
    }

    def lazy(name: str) -> LazyTensor:
        tensor = tensors[name]
        return LazyTensor(
            name,
            tensor.dtype,
            tuple(tensor.shape),
            lambda: iter(tensor.split(2)) if tensor.dim() else iter([tensor]),
        )

    path = tmp_path / "model.safetensors"
    with open(path, "wb", buffering=0) as file:
        stream = ChecksumWriter(file)
        write_shard(stream, map(lazy, tensors))
    assert (stream.count, stream.crc) == (path.stat().st_size, checksum(path))
    for loaded in (load_file(path), _read_ours(tmp_path)):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)


def _read_ours(folder: Path) -> dict[str, torch.Tensor]:
    hf = HFCheckpoint(folder)
    return {
        one.name: torch.cat([piece.reshape(-1) for piece in one.pieces()]).reshape(one.shape)
        for one in hf.lazy(hf.tensors)
    }


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12), limit=st.integers(1, 60))
def test_shards_keep_order_and_limit(sizes: list[int], limit: int) -> None:
    tensors = [
        LazyTensor(f"t{i}", torch.uint8, (size,), lambda: iter(())) for i, size in enumerate(sizes)
    ]
    shards = plan_shards(tensors, limit)
    assert [one for shard in shards.values() for one in shard] == tensors
    for shard in shards.values():
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard) <= limit
    assert sorted(shards) == list(shards)


@given(shape=st.lists(st.integers(1, 6), min_size=0, max_size=3), limit=st.integers(1, 100))
def test_pieces_of_a_box_are_the_box_in_order(shape: list[int], limit: int) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape)
    whole = Box.whole(tuple(shape))
    parts = [box.of(tensor).reshape(-1) for box in split_rows(whole, 8, limit)]
    assert torch.equal(torch.cat(parts), tensor.reshape(-1))
