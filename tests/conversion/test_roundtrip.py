"""Import, then export: the same tensors, names, dtypes and files."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from checkpoint_tools.mcore.read import MegatronCheckpoint
from checkpoint_tools.table.names import Naming, rows
from checkpoint_tools.table.transforms import CHUNK_BYTES
from qwen35_mcore.config.model_config import Qwen35Config
from tests.helpers.ckpt_cli import ckpt, ckpt_process, ok
from tests.helpers.hf_toy import (
    KINDS,
    OTHER_FILES,
    pack_experts,
    read_all,
    rewrite,
    save_folder,
    write_toy,
)
from tests.helpers.kinds import examples, kinds
from tests.helpers.random_configs import configs

FOLDERS = (*KINDS, "qwen3_5_moe_text-packed", "qwen3_5_moe-packed")


def assert_same_folder(source: Path, result: Path) -> None:
    """Every tensor equal with its name and dtype, read by safetensors itself; files identical."""
    before, after = read_all(source), read_all(result)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name
    for name in ("config.json", *OTHER_FILES):
        assert (result / name).read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize("layout", ["qwen35", "mcore"])
@pytest.mark.parametrize("folder", kinds(FOLDERS, ("qwen3_5_text", "qwen3_5_moe-packed")))
def test_import_then_export_gives_the_folder_back(
    toys: dict[str, Path], tmp_path: Path, folder: str, layout: str
) -> None:
    source = toys[folder]
    ok(ckpt("import", source, tmp_path / "m", "--layout", layout, "--max-shard-size", "200KB"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "hf", "--max-shard-size", "300KB"))
    assert_same_folder(source, tmp_path / "hf")
    ok(ckpt("verify", source, tmp_path / "m"))
    ok(ckpt("verify", source, tmp_path / "hf"))


def test_the_commands_as_processes(toys: dict[str, Path], tmp_path: Path) -> None:
    source = toys["qwen3_5_moe"]
    ok(ckpt_process("import", source, tmp_path / "m"))
    ok(ckpt_process("export", tmp_path / "m" / "release", tmp_path / "hf"))
    assert_same_folder(source, tmp_path / "hf")
    verdict = json.loads(ok(ckpt_process("verify", tmp_path / "hf", source, "--json")).out)
    assert verdict["equal"] is True
    assert verdict["tensors"] == len(read_all(source))


@pytest.mark.parametrize("kind", kinds(KINDS, ("qwen3_5_moe_text",)))
def test_tied_without_mtp(tmp_path: Path, kind: str) -> None:
    write_toy(tmp_path / "hf", kind, mtp=False, tied=True)
    assert "lm_head.weight" not in read_all(tmp_path / "hf")
    ok(ckpt("import", tmp_path / "hf", tmp_path / "m"))
    assert not any(
        key.startswith(("mtp.", "output_layer."))
        for key in MegatronCheckpoint(tmp_path / "m").tensors
    )
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    assert_same_folder(tmp_path / "hf", tmp_path / "back")


def test_any_mix_of_dtypes(tmp_path: Path) -> None:
    write_toy(tmp_path / "hf", "qwen3_5_moe_text")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def mix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(dtypes[i % 3]) for i, (name, tensor) in enumerate(tensors.items())}

    rewrite(tmp_path / "hf", mix)
    ok(ckpt("import", tmp_path / "hf", tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    assert_same_folder(tmp_path / "hf", tmp_path / "back")


def test_other_tensors_are_carried_when_asked(tmp_path: Path) -> None:
    write_toy(tmp_path / "hf", "qwen3_5_text")
    extra = {"adapter.scale": torch.tensor(3), "adapter.empty": torch.empty(0, 4)}
    rewrite(tmp_path / "hf", lambda tensors: tensors | extra)
    ok(ckpt("import", tmp_path / "hf", tmp_path / "m", "--carry", "adapter.*"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "back"))
    assert_same_folder(tmp_path / "hf", tmp_path / "back")


def without_mtp(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """For `rewrite`: as transformers saves."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}


@pytest.mark.parametrize("kind", ["qwen3_5_text", "qwen3_5_moe"])
def test_a_config_that_promises_an_mtp_layer_that_was_dropped(tmp_path: Path, kind: str) -> None:
    source, back = tmp_path / "hf", tmp_path / "back"
    write_toy(source, kind)
    rewrite(source, without_mtp)
    assert "--no-mtp" in ckpt("import", source, tmp_path / "m").err
    ok(ckpt("import", source, tmp_path / "m", "--no-mtp"))
    recorded = json.loads(MegatronCheckpoint(tmp_path / "m").argument("qwen35_hf_config"))
    assert recorded.get("text_config", recorded)["mtp_num_hidden_layers"] == 0
    ok(ckpt("export", tmp_path / "m", back))
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, back))
    before.get("text_config", before)["mtp_num_hidden_layers"] = 0
    assert after == before
    told = ok(ckpt("verify", source, back)).out
    assert "note     A: the config has an MTP layer that is not there" in told
    assert "note     B" not in told
    ok(ckpt("import", back, tmp_path / "again"))
    ok(ckpt("verify", tmp_path / "m", tmp_path / "again"))


@pytest.mark.parametrize("where", ["import", "export"])
def test_the_mtp_layer_is_left_out_when_asked(
    toys: dict[str, Path], tmp_path: Path, where: str
) -> None:
    source, back = toys["qwen3_5_moe_text"], tmp_path / "back"
    flags = {where: ["--no-mtp"]}
    told = ok(ckpt("import", source, tmp_path / "m", *flags.get("import", []))).out
    assert ("left out, the MTP layer" in told) == (where == "import")
    ok(ckpt("export", tmp_path / "m", back, *flags.get("export", [])))
    assert read_all(back).keys() == without_mtp(read_all(source)).keys()
    config = json.loads((source / "config.json").read_text())
    assert json.loads((back / "config.json").read_text()) == config | {"mtp_num_hidden_layers": 0}
    ok(ckpt("import", back, tmp_path / "again"))
    outcome = ckpt("verify", source, back)
    assert outcome.code == 1
    assert "note     B has no MTP layer" in outcome.out
    assert ckpt("verify", back, source).code == 1


def test_an_mtp_layer_that_is_carried_stays_in_the_config(
    toys: dict[str, Path], tmp_path: Path
) -> None:
    source, back = toys["qwen3_5_text"], tmp_path / "back"
    ok(ckpt("import", source, tmp_path / "m", "--no-mtp", "--carry", "mtp.*"))
    ok(ckpt("export", tmp_path / "m", back))
    assert_same_folder(source, back)
    ok(ckpt("import", back, tmp_path / "again"))


def test_packed_and_separate_experts_make_the_same_checkpoint(
    toys: dict[str, Path], tmp_path: Path
) -> None:
    ok(ckpt("import", toys["qwen3_5_moe"], tmp_path / "a"))
    ok(ckpt("import", toys["qwen3_5_moe-packed"], tmp_path / "b"))
    ok(ckpt("verify", tmp_path / "a", tmp_path / "b"))


def test_values_that_bfloat16_cannot_hold_stay(toys: dict[str, Path], tmp_path: Path) -> None:
    a_log = read_all(toys["qwen3_5_text"])["model.layers.0.linear_attn.A_log"]
    assert not torch.equal(a_log.bfloat16().float(), a_log)
    ok(ckpt("import", toys["qwen3_5_text"], tmp_path / "m"))
    tensors = MegatronCheckpoint(tmp_path / "m").tensors
    float32 = {key for key, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert {key.split("self_attention.")[1] for key in float32} == {
        "A_log",
        "dt_bias",
        "gated_norm.weight",
    }


def test_chunks_are_small_and_one_per_expert_and_half(
    toys: dict[str, Path], tmp_path: Path
) -> None:
    ok(ckpt("import", toys["qwen3_5_moe-packed"], tmp_path / "m"))
    tensors: Any = MegatronCheckpoint(tmp_path / "m").tensors
    experts = tensors["decoder.layers.0.mlp.experts.experts.linear_fc1.weight"]
    assert {chunk.box.shape for chunk in experts.chunks} == {(1, 32, 64)}
    assert len(experts.chunks) == 2 * 8
    for tensor in tensors.values():
        for chunk in tensor.chunks:
            assert chunk.box.size * tensor.dtype.itemsize <= CHUNK_BYTES


def test_pack_experts_is_what_transformers_means(toys: dict[str, Path]) -> None:
    """The toy's packed form, against transformers' own parameters loaded from the separate one."""
    from tests.helpers.hf_reference import modeling

    model_class = modeling("qwen3_5_moe").Qwen3_5MoeForCausalLM
    model = model_class.from_pretrained(toys["qwen3_5_moe_text"])
    packed = pack_experts(read_all(toys["qwen3_5_moe_text"]))
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            assert torch.equal(packed[name], parameter), name


@examples(15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=configs(),
    experts=st.sampled_from(["packed", "per_expert"]),
    layout=st.sampled_from(["qwen35", "mcore"]),
    seed=st.integers(0, 2**16),
)
def test_any_config_and_any_dtypes(
    tmp_path: Path, config: Qwen35Config, experts: Any, layout: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    choice = random.Random(seed)
    tensors = {
        spec.name: torch.randn(spec.shape, generator=generator).to(
            choice.choice([torch.float32, torch.bfloat16, torch.float16])
        )
        for row in rows(config, Naming.default(config, experts))
        for spec in row.hf
    }
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        root = Path(folder)
        save_folder(root / "hf", tensors, config)
        ok(ckpt("import", root / "hf", root / "m", "--layout", layout))
        ok(ckpt("export", root / "m", root / "back", "--max-shard-size", "2KB"))
        after = read_all(root / "back")
        assert after.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert after[name].dtype == tensor.dtype, name
            assert torch.equal(after[name], tensor), name
