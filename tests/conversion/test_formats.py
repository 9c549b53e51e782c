"""The bytes that are written: valid torch archives, right checksums, what torch itself reads."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp

from checkpoint_tools.files.checksums import ChecksumWriter
from checkpoint_tools.mcore.archive import MappedFile, map_tensor
from checkpoint_tools.mcore.read import MegatronCheckpoint
from checkpoint_tools.mcore.write import Item, Target, write_tensors
from checkpoint_tools.table.transforms import Box
from tests.helpers.ckpt_cli import ckpt, ok

TENSORS = [
    torch.randn(3, 5),
    torch.randn(2, 3, 4).bfloat16(),
    torch.randn(7, dtype=torch.float64),
    torch.arange(9, dtype=torch.int64),
    torch.zeros(1, 1, dtype=torch.float16),
]


@given(parts=st.lists(st.binary(max_size=300)))
def test_checksums_are_those_of_zip_archives(parts: list[bytes]) -> None:
    file = io.BytesIO()
    stream = ChecksumWriter(file)
    assert [stream.write(part) for part in parts] == [len(part) for part in parts]
    assert (file.getvalue(), stream.count) == (b"".join(parts), sum(map(len, parts)))
    assert stream.crc == zlib.crc32(file.getvalue())


def test_checksum_of_a_long_part() -> None:
    data = bytes(range(256)) * 2**13
    stream = ChecksumWriter(io.BytesIO())
    stream.write(b"head")
    stream.write(data)
    assert stream.crc == zlib.crc32(b"head" + data)


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: str(tensor.dtype))
def test_a_written_tensor_is_one_that_torch_and_zip_accept(tensor: torch.Tensor) -> None:
    """Of a box of a larger tensor the file holds the box alone."""
    whole = torch.stack([tensor, torch.zeros_like(tensor)])
    file = io.BytesIO()
    shape = tuple(tensor.shape)
    item = Item(Target("key", tensor.dtype, shape), Box.whole(shape), lambda: whole[0])
    assert write_tensors(ChecksumWriter(file), [item]) == [[0, len(file.getvalue())]]
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert loaded.dtype == tensor.dtype
    assert torch.equal(loaded, tensor)
    assert zipfile.ZipFile(file).testzip() is None
    saved = io.BytesIO()
    torch.save(tensor, saved)
    assert len(file.getvalue()) == len(saved.getvalue())


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda tensor: str(tensor.dtype))
@pytest.mark.parametrize("skip", [0, 64, 13])
def test_what_torch_saved_is_mapped(tensor: torch.Tensor, skip: int, tmp_path: Path) -> None:
    for value in (tensor, tensor.t().clone().t() if tensor.dim() == 2 else tensor):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        path = tmp_path / "file"
        path.write_bytes(bytes(skip) + buffer.getvalue() + b"more")
        mapped = map_tensor(MappedFile(path), skip, len(buffer.getvalue()))
        assert mapped.dtype == value.dtype
        assert torch.equal(mapped, value)


def test_torchs_own_reader_and_writer(toys: dict[str, Path], tmp_path: Path) -> None:
    """An import read by torch.distributed.checkpoint; its checkpoint read by ours."""
    ok(ckpt("import", toys["qwen3_5_moe"], tmp_path / "m"))
    ours = MegatronCheckpoint(tmp_path / "m")
    state = {
        key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in ours.tensors.items()
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "m" / "release"), no_dist=True)
    for key, tensor in state.items():
        whole = Box.whole(tuple(tensor.shape))
        assert torch.equal(ours.read(key, whole), tensor), key
    theirs = tmp_path / "iter_0000001"
    dcp.save(state, storage_writer=dcp.FileSystemWriter(theirs), no_dist=True)
    (theirs / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    read = MegatronCheckpoint(theirs)
    assert read.tensors.keys() == state.keys()
    for key, tensor in state.items():
        whole = Box.whole(tuple(tensor.shape))
        assert torch.equal(read.read(key, whole), tensor), key
