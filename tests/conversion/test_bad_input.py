"""Bad input: one clear error, exit status 2, and nothing that looks complete."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from checkpoint_tools.inspect_ckpt import inspect_folder
from checkpoint_tools.mcore.exported import recorded_config
from qwen35_mcore.errors import ConfigError
from tests.helpers.ckpt_cli import ckpt, ckpt_process, ok, refused
from tests.helpers.hf_toy import INDEX, pack_experts, rewrite

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
SHARD = "model-00002-of-00003.safetensors"
GATE = "model.layers.0.mlp.gate.weight"


def missing_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def truncated_shard(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


def truncated_header(folder: Path) -> None:
    os.truncate(folder / SHARD, 100)


def no_safetensors(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"<!DOCTYPE html><html>rate limited</html>")


def index_of_another(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][GATE] = "model-00001-of-00003.safetensors"
    index["weight_map"]["model.norm.weight"] = SHARD
    (folder / INDEX).write_text(json.dumps(index))


def index_lacks_a_tensor(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][GATE]
    (folder / INDEX).write_text(json.dumps(index))


def no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


def index_is_a_folder(folder: Path) -> None:
    (folder / INDEX).unlink()
    (folder / INDEX).mkdir()


def shard_elsewhere(folder: Path) -> None:
    index = (folder / INDEX).read_text()
    (folder / INDEX).write_text(index.replace(SHARD, f"../{SHARD}"))


def tensors(change: Change) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, change)


def without(name: str) -> Change:
    return lambda given: {key: value for key, value in given.items() if key != name}


def with_tensor(name: str, tensor: torch.Tensor) -> Change:
    return lambda given: given | {name: tensor}


DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "missing shard": (missing_shard, ("a shard is missing", SHARD)),
    "truncated shard": (truncated_shard, ("truncated", SHARD)),
    "truncated header": (truncated_header, (SHARD,)),
    "an error page instead of a shard": (no_safetensors, ("not a safetensors file", SHARD)),
    "index of another checkpoint": (index_of_another, ("the index says",)),
    "index lacks a tensor": (index_lacks_a_tensor, ("not in the index", GATE)),
    "no index": (no_index, (INDEX,)),
    "no config": (no_config, ("config.json",)),
    "missing tensor": (tensors(without(GATE)), ("1 tensors are missing", GATE)),
    "unknown tensor": (
        tensors(with_tensor("model.layers.0.adapter", torch.zeros(2))),
        ("1 unknown tensors", "--carry 'model.layers.0.adapter'"),
    ),
    "wrong shape": (tensors(with_tensor(GATE, torch.zeros(9, 64))), (GATE, "(9, 64)", "(8, 64)")),
    "quantised": (
        tensors(with_tensor(GATE, torch.zeros(8, 64).to(torch.float8_e4m3fn))),
        (GATE, "quantised"),
    ),
    "a dtype of quantised weights": (
        tensors(with_tensor(GATE, torch.ones(8, 64).to(torch.float8_e8m0fnu))),
        ("F8_E8M0", "allowed: F32, BF16", "quantised"),
    ),
    "a folder instead of the index": (
        index_is_a_folder,
        ("fix: fetch model.safetensors.index.json",),
    ),
    "an index of other folders": (
        shard_elsewhere,
        ("no file name", "fix: put the shards beside the index"),
    ),
    "config of fewer layers": (
        edit_config(num_hidden_layers=2, layer_types=None),
        ("beyond config.json's num_hidden_layers", "fix: correct config.json"),
    ),
    "config of fewer experts": (
        edit_config(num_experts=4),
        ("beyond config.json's num_experts", "fix: correct config.json"),
    ),
    "experts packed and one by one": (
        tensors(lambda given: given | pack_experts(given)),
        ("the experts are stored twice", "fix: nobody can tell"),
    ),
    "config of another size": (edit_config(hidden_size=128), ("another shape", "(256, 64)")),
    "config of more layers": (
        edit_config(num_hidden_layers=8, layer_types=None),
        ("tensors are missing",),
    ),
    "config without MTP": (edit_config(mtp_num_hidden_layers=0), ("mtp.*",)),
    "config that ties": (edit_config(tie_word_embeddings=True), ("lm_head.weight",)),
    "lm_head missing": (
        tensors(without("lm_head.weight")),
        ("lm_head.weight", "tie_word_embeddings"),
    ),
    "config of the other kind": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}') and None,
        ("model_type",),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_hugging_face_folder(
    copy_of: Callable[[str], Path], tmp_path: Path, damage: str
) -> None:
    source = copy_of("qwen3_5_moe_text")
    change, mentions = DAMAGES[damage]
    change(source)
    refused(ckpt("import", source, tmp_path / "m"), *mentions)
    refused(ckpt("import", source, tmp_path / "m", "--dry-run"), *mentions)
    assert not list(tmp_path.glob("m*"))


def test_a_real_process_says_the_same(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy_of("qwen3_5_moe_text")
    truncated_shard(source)
    refused(ckpt_process("import", source, tmp_path / "m"), "truncated", SHARD)


@pytest.mark.parametrize("text", ["{", "5", "[1]", '{"model_type": "llama"}'])
def test_a_recorded_config_that_is_damaged(text: str) -> None:
    checkpoint: Any = SimpleNamespace(argument=lambda name: text, folder=Path("run"))
    with pytest.raises(ConfigError):
        recorded_config(checkpoint)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(ckpt("import", tmp_path / "nothing", tmp_path / "m"), "no such folder")
    refused(ckpt("export", tmp_path / "nothing", tmp_path / "hf"), "no such folder")
    refused(ckpt("export", tmp_path, tmp_path / "hf"), "no Megatron checkpoint")
    refused(ckpt("inspect", tmp_path / "nothing"), "no such folder")


def test_a_repo_that_cannot_be_fetched(tmp_path: Path) -> None:
    refused(ckpt("import", "nobody/no-such-model", tmp_path / "m"), "nobody/no-such-model", "Hub")


@pytest.fixture
def imported(toys: dict[str, Path], tmp_path: Path) -> Path:
    """A Megatron checkpoint of one's own, to damage."""
    arguments = ("--max-shard-size", "300KB")
    ok(ckpt("import", toys["qwen3_5_moe_text"], tmp_path / "m", *arguments))
    return tmp_path / "m"


def lose(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def shorten(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


MEGATRON_DAMAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "no .metadata": (lose("release/.metadata"), ("incomplete", ".metadata")),
    "no metadata.json": (lose("release/metadata.json"), ("incomplete", "metadata.json")),
    "no tracker": (lose("latest_checkpointed_iteration.txt"), ("no Megatron checkpoint",)),
    "missing file": (lose("release/__1_0.distcp"), ("incomplete", "__1_0.distcp")),
    "truncated file": (shorten("release/__1_0.distcp"), ("shorter", "__1_0.distcp")),
    "damaged .metadata": (overwrite("release/.metadata", b"\x80\x04junk"), ("cannot be read",)),
    "other format": (
        overwrite("release/metadata.json", b'{"sharded_backend": "zarr"}'),
        ("another format", "zarr"),
    ),
    "tracker of another iteration": (
        overwrite("latest_checkpointed_iteration.txt", b"70"),
        ("iter_0000070", "fix: name the checkpoint itself: ", "/release"),
    ),
    "tracker that is no text": (
        overwrite("latest_checkpointed_iteration.txt", b"\xff\xfe"),
        ("the tracker file is malformed", "/release"),
    ),
    "tracker of a huge number": (
        overwrite("latest_checkpointed_iteration.txt", b"9" * 5000),
        ("the tracker file is malformed", "/release"),
    ),
    "tracker with rubbish": (
        overwrite("latest_checkpointed_iteration.txt", b"\x00?"),
        ("tracker",),
    ),
}


@pytest.mark.parametrize("damage", MEGATRON_DAMAGES)
def test_a_damaged_megatron_checkpoint(imported: Path, tmp_path: Path, damage: str) -> None:
    change, mentions = MEGATRON_DAMAGES[damage]
    change(imported)
    refused(ckpt("export", imported, tmp_path / "hf"), *mentions)
    assert not list(tmp_path.glob("hf*"))


def test_what_a_wrong_kind_of_folder_is(toys: dict[str, Path], tmp_path: Path) -> None:
    source = toys["qwen3_5_moe_text"]
    refused(ckpt("export", source, tmp_path / "hf"), "fix: this is a Hugging Face folder")


@pytest.mark.parametrize(
    ("pattern", "mention"),
    [
        ("lm_head.weight", "--carry names the model"),
        ("*", "--carry names the model"),
        ("adaptor.*", "--carry names no tensor that is there"),
    ],
)
def test_what_cannot_be_carried(
    toys: dict[str, Path], tmp_path: Path, pattern: str, mention: str
) -> None:
    source = toys["qwen3_5_moe_text"]
    refused(ckpt("import", source, tmp_path / "m", "--carry", pattern), mention, repr(pattern))


def test_an_empty_name_to_explain_converts_nothing(toys: dict[str, Path], tmp_path: Path) -> None:
    source = toys["qwen3_5_moe_text"]
    refused(ckpt("import", source, tmp_path / "m", "--explain", ""), "there is no such tensor")


def test_a_link_as_target_is_followed(toys: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "m").symlink_to("disk")
    source = toys["qwen3_5_moe_text"]
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("import", source, tmp_path / "m", "--overwrite"))
    assert (tmp_path / "m").is_symlink()
    assert (tmp_path / "disk/release").is_dir()
    assert not list(tmp_path.glob("*.partial"))
    ok(ckpt("verify", source, tmp_path / "m"))
    (tmp_path / "new").symlink_to("not-yet")
    ok(ckpt("export", tmp_path / "m", tmp_path / "new"))
    assert (tmp_path / "not-yet/config.json").is_file()


def test_a_pickle_that_would_run_a_program(imported: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    import pickle

    (imported / "release" / ".metadata").write_bytes(pickle.dumps(Evil()))
    refused(ckpt("export", imported, tmp_path / "hf"), "cannot be read")
    assert not (tmp_path / "ran").exists()


def test_what_was_carried_is_lost(imported: Path, toys: dict[str, Path], tmp_path: Path) -> None:
    (carried,) = imported.glob("qwen35-origin-*")
    shutil.rmtree(carried)
    refused(ckpt("export", imported, tmp_path / "hf"), "--reference", carried.name)
    reference = toys["qwen3_5_moe_text"]
    ok(ckpt("export", imported, tmp_path / "hf", "--reference", reference))
    ok(ckpt("verify", reference, tmp_path / "hf"))


def test_reference_of_another_model(imported: Path, toys: dict[str, Path], tmp_path: Path) -> None:
    refused(
        ckpt("export", imported, tmp_path / "hf", "--reference", toys["qwen3_5_text"]),
        "another kind",
    )


@pytest.mark.parametrize("size", ["", "5 apples", "-1GB", "0"])
def test_sizes_that_are_none(toys: dict[str, Path], tmp_path: Path, size: str) -> None:
    refused(
        ckpt("import", toys["qwen3_5_text"], tmp_path / "m", f"--max-shard-size={size}"),
        "not a size",
    )


def test_read_only_target(toys: dict[str, Path], tmp_path: Path, read_only: Path) -> None:
    outcome = ckpt("import", toys["qwen3_5_text"], read_only / "m")
    refused(outcome, "Read-only file system")
    assert not (read_only / "m").exists()
    ok(ckpt("import", toys["qwen3_5_text"], tmp_path / "m"))
    refused(ckpt("export", tmp_path / "m", read_only / "hf"), "Read-only file system")


def test_full_disk_and_then_more_room(toys: dict[str, Path], small_disk: Path) -> None:
    target = small_disk / "m"
    source = toys["qwen3_5_moe"]
    arguments = ("import", source, target, "--max-shard-size", "100KB", "--workers", "1")
    refused(ckpt(*arguments), "No space left on device")
    assert not target.exists()
    assert inspect_folder(small_disk / "m.partial")["complete"] is False
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    ok(ckpt(*arguments))
    ok(ckpt("verify", source, target))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", "size=512k")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path / "disk", "size=1m,ro")


def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small tmpfs, for as long as the test runs."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_header_that_claims_the_whole_memory(
    copy_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = copy_of("qwen3_5_moe_text")
    (source / SHARD).write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(ckpt("import", source, tmp_path / "m"), SHARD)
