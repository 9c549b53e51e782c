"""Weights that are no Hugging Face model, or two at once: refused, and the advice works."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.ckpt_cli import ckpt, ok, refused
from tests.helpers.hf_reference import load_pretrained
from tests.helpers.hf_toy import INDEX, edit_config, read_all, rewrite

SINGLE = "model.safetensors"
Copy = Callable[[str], Path]


def single(folder: Path, *, keep_index: bool = True, factor: float = 1.0) -> None:
    """Add a complete model.safetensors; without `keep_index` it is the only one."""
    tensors = {name: tensor * factor for name, tensor in read_all(folder).items()}
    if not keep_index:
        for path in (*folder.glob("*.safetensors"), folder / INDEX):
            path.unlink()
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def test_a_complete_file_beside_an_index_that_agrees(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("qwen3_5_text")
    single(source)
    told = ok(ckpt("import", source, tmp_path / "m")).out
    assert f"left out, other weights: {SINGLE}" in told


@pytest.mark.parametrize("stale", ["other values", "a shard is gone", "malformed"])
def test_a_complete_file_beside_a_stale_index(
    copy_of: Copy, toys: dict[str, Path], tmp_path: Path, stale: str
) -> None:
    source = copy_of("qwen3_5_text")
    single(source, factor=2.0 if stale == "other values" else 1.0)
    if stale == "a shard is gone":
        (source / "model-00002-of-00003.safetensors").unlink()
    if stale == "malformed":
        (source / INDEX).write_text("{}")
    refused(ckpt("import", source, tmp_path / "m"), "two sets of weights", SINGLE, INDEX)
    assert json.loads(ckpt("inspect", source, "--json").out)["complete"] is False
    for path in (source / INDEX, *source.glob("model-*.safetensors")):
        path.rename(tmp_path / path.name)
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    expected = read_all(source)
    assert all(torch.equal(t, expected[n]) for n, t in read_all(tmp_path / "back").items())


def test_shards_that_the_index_does_not_name(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("qwen3_5_text")
    extra = source / "model-00001-of-00005.safetensors"
    save_file({"model.norm.weight": torch.ones(64)}, extra)
    refused(ckpt("import", source, tmp_path / "m"), extra.name, "move them away")
    extra.rename(tmp_path / extra.name)
    ok(ckpt("import", source, tmp_path / "m"))


def test_other_variants_beside_are_named_and_left_out(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("qwen3_5_text")
    for name in ("model.fp16.safetensors", "consolidated.safetensors"):
        save_file({"x": torch.ones(1)}, source / name)
    (source / "model.fp16.safetensors.index.json").write_text("{}")
    told = ok(ckpt("import", source, tmp_path / "m")).out
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    for path in source.glob("*fp16*"):
        assert f"left out, other weights: {path.name}" in told
        assert not (tmp_path / "back" / path.name).exists()


def test_a_variant_alone(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("qwen3_5_text")
    single(source, keep_index=False)
    (source / SINGLE).rename(source / "model.bf16.safetensors")
    refused(ckpt("import", source, tmp_path / "m"), f"rename it to {SINGLE}")
    (source / "model.bf16.safetensors").rename(source / SINGLE)
    ok(ckpt("import", source, tmp_path / "m"))


def test_an_index_of_another_name(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("qwen3_5_text")
    variant = source / "model.fp16.safetensors.index.json"
    (source / INDEX).rename(variant)
    refused(ckpt("import", source, tmp_path / "m"), f"rename it to {INDEX}")
    variant.rename(source / INDEX)
    ok(ckpt("import", source, tmp_path / "m"))


def advised_python(message: str) -> str:
    """The program of a ``python -c "..."`` in a message."""
    found = re.search(r'python -c "(.*)"$', message, re.MULTILINE)
    assert found, message
    return found[1]


@pytest.mark.parametrize("files", [1, 2])
def test_pickled_weights(copy_of: Copy, toys: dict[str, Path], tmp_path: Path, files: int) -> None:
    source = copy_of("qwen3_5_text")
    tensors = read_all(source)
    for path in (*source.glob("*.safetensors"), source / INDEX):
        path.unlink()
    names = sorted(tensors)
    for i in range(files):
        part = {name: tensors[name] for name in names[i::files]}
        name = f"pytorch_model-{i + 1:05}-of-{files:05}.bin" if files > 1 else "pytorch_model.bin"
        torch.save(part, source / name)
    (source / "pytorch_model.bin.index.json").write_text("{}")
    torch.save({}, source / "training_args.bin")
    outcome = ckpt("import", source, tmp_path / "m")
    refused(outcome, "pickled")
    assert "training_args.bin" not in outcome.err
    exec(advised_python(outcome.err), {})
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("verify", toys["qwen3_5_text"], tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    assert not list((tmp_path / "back").glob("*.bin*"))


def test_pickles_beside_safetensors(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("qwen3_5_text")
    tensors = read_all(source)
    pickled = source / "pytorch_model.bin"
    torch.save(tensors | {"buffer": torch.ones(1)}, pickled)
    assert f"weights: {pickled.name}" in ok(ckpt("import", source, tmp_path / "a")).out
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, pickled)
    refused(ckpt("import", source, tmp_path / "b"), "two sets of weights", pickled.name)
    torch.save({"model": tensors}, pickled)
    refused(ckpt("import", source, tmp_path / "b"), "two sets of weights", pickled.name)
    pickled.unlink()
    ok(ckpt("import", source, tmp_path / "b"))


def empty_of_weights(folder: Path) -> None:
    """Only config and tokenizer stay."""
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink()


FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "GGUF": (("model-q4.gguf",), ("GGUF",)),
    "state dict": (("consolidated.00.pth",), ("pickled", "consolidated.00.pth")),
    "DeepSpeed": (
        ("zero_to_fp32.py", "global_step5/mp_rank_00_model_states.pt"),
        ("zero_to_fp32.py",),
    ),
    "FSDP of accelerate": (
        ("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"),
        ("accelerate merge-weights", "pytorch_model_fsdp_0"),
    ),
    "DCP": ((".metadata", "__0_0.distcp"), ("accelerate merge-weights",)),
    "Megatron": ((".metadata", "metadata.json", "__0_0.distcp"), ("Megatron", "export")),
    "verl": (("model_world_size_2_rank_0.pt", "fsdp_config.json"), ("verl.model_merger",)),
    "in a folder below": (("checkpoint-500/model.safetensors",), ("below", "checkpoint-500")),
    "nothing": (("README.md",), ("no safetensors weights",)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_others(copy_of: Copy, tmp_path: Path, name: str) -> None:
    source = copy_of("qwen3_5_text")
    empty_of_weights(source)
    files, mentions = FORMATS[name]
    for file in files:
        (source / file).parent.mkdir(exist_ok=True)
        (source / file).write_bytes(b"")
    refused(ckpt("import", source, tmp_path / "m"), *mentions, "fix: ")


def test_a_file_that_git_did_not_fetch(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("qwen3_5_text")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (source / "model-00002-of-00003.safetensors").write_bytes(pointer)
    refused(ckpt("import", source, tmp_path / "m"), "git lfs pull")


ADAPTER = {
    "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight": torch.ones(2, 64),
    "base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight": torch.ones(64, 2),
}


def test_an_adapter_alone_and_beside_the_weights(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("qwen3_5_text")
    config = {"base_model_name_or_path": "Qwen/Qwen3.5-4B", "peft_type": "LORA"}
    adapter = source / "adapter_model.safetensors"
    save_file(ADAPTER, adapter)
    (source / "adapter_config.json").write_text(json.dumps(config))
    refused(ckpt("import", source, tmp_path / "m"), "merge_and_unload", "move adapter_*")
    only = tmp_path / "only"
    only.mkdir()
    for path in source.glob("adapter_*"):
        shutil.move(path, only)
    ok(ckpt("import", source, tmp_path / "m"))
    refused(ckpt("import", only, tmp_path / "n"), "Qwen/Qwen3.5-4B", "merge_and_unload")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight",
        "model.layers.3.self_attn.q_proj.base_layer.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
    ],
)
def test_an_adapter_that_is_not_merged(copy_of: Copy, tmp_path: Path, name: str) -> None:
    source = copy_of("qwen3_5_text")
    rewrite(source, lambda tensors: tensors | {name: torch.ones(2, 2)})
    refused(ckpt("import", source, tmp_path / "m"), "not merged", "merge_and_unload")


@pytest.mark.parametrize(
    "name",
    [
        "weight_scale_inv",
        "weight_scale",
        "qweight",
        "g_idx",
        "SCB",
        "weight.absmax",
        "weight_packed",
        "weight.quant_state.bitsandbytes__nf4",
    ],
)
def test_quantised_weights(copy_of: Copy, tmp_path: Path, name: str) -> None:
    source = copy_of("qwen3_5_text")
    scale = f"model.layers.3.self_attn.q_proj.{name}"
    rewrite(source, lambda tensors: tensors | {scale: torch.ones(2)})
    refused(ckpt("import", source, tmp_path / "m"), "quantised", "bfloat16")


def test_a_config_that_says_quantised(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("qwen3_5_text")
    edit_config(source, quantization_config={"quant_method": "fp8"})
    refused(ckpt("import", source, tmp_path / "m"), "quantised", "bfloat16")
    edit_config(source, quantization_config=None)
    ok(ckpt("import", source, tmp_path / "m"))


def test_float16_weights_stay_what_they_are(copy_of: Copy, tmp_path: Path) -> None:
    source = copy_of("qwen3_5_text")
    rewrite(source, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    edit_config(source, dtype="float16")
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    ok(ckpt("verify", source, tmp_path / "back"))
    load_pretrained(tmp_path / "back")
