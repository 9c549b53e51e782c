"""Export of checkpoints that training wrote: any layout, padding, dtypes, main parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from checkpoint_tools.table.names import Naming, hf_to_mcore, rows
from qwen35_mcore.config.model_config import Qwen35Config
from tests.helpers.ckpt_cli import ckpt, ok, refused
from tests.helpers.hf_toy import read_all
from tests.helpers.mcore_toy import write_training_checkpoint
from tests.helpers.toys import toy_config


def random_model(config: Qwen35Config, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Hugging Face tensors of a model in training: GDN's three in float32."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for row in rows(config, Naming.default(config)):
        for spec in row.hf:
            wanted = torch.float32 if row.float32 else dtype
            tensors[spec.name] = torch.randn(spec.shape, generator=generator).to(wanted)
    return tensors


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("moe", [True, False])
def test_a_run_that_never_saw_an_import(tmp_path: Path, moe: bool, axis: int) -> None:
    config = toy_config(moe=moe, mtp_num_hidden_layers=1)
    hf = random_model(config, torch.bfloat16)
    run = write_training_checkpoint(tmp_path / "run", hf_to_mcore(config, hf), config, axis=axis)
    ok(ckpt("export", run, tmp_path / "hf", "--max-shard-size", "100KB"))
    result = read_all(tmp_path / "hf")
    assert result.keys() == hf.keys()
    assert all(torch.equal(result[name], hf[name]) for name in hf)
    assert all(result[name].dtype == hf[name].dtype for name in hf)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written.pop("dtype") == "bfloat16"
    assert Qwen35Config.from_hf(written) == config


def test_a_tracked_iteration_or_its_folder(tmp_path: Path) -> None:
    config = toy_config()
    tensors = hf_to_mcore(config, random_model(config, torch.bfloat16))
    run = write_training_checkpoint(tmp_path / "run", tensors, config)
    ok(ckpt("export", run, tmp_path / "a"))
    ok(ckpt("export", run / "iter_0000007", tmp_path / "b"))
    ok(ckpt("verify", tmp_path / "a", tmp_path / "b"))


def test_padded_vocabulary_rows_never_leak(tmp_path: Path) -> None:
    config = toy_config(vocab_size=250)
    hf = random_model(config, torch.bfloat16)
    tensors = hf_to_mcore(config, hf)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        padding = torch.full((6, 64), 777.0, dtype=torch.bfloat16)
        tensors[key] = torch.cat([tensors[key], padding])
    run = write_training_checkpoint(tmp_path / "run", tensors, config, axis=0)
    ok(ckpt("export", run, tmp_path / "hf"))
    result = read_all(tmp_path / "hf")
    assert result["lm_head.weight"].shape == (250, 64)
    assert all(torch.equal(result[name], hf[name]) for name in hf)
    assert not any(bool((tensor == 777).any()) for tensor in result.values())


def with_main_parameters(
    tensors: dict[str, torch.Tensor], prefix: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """bfloat16 tensors beside float32 main ones that they are rounded from; those too."""
    main = {key: tensor.float() * 1.0001 for key, tensor in tensors.items()}
    stored = {
        key: main[key] if tensors[key].dtype == torch.float32 else main[key].bfloat16()
        for key in tensors
    }
    # a main copy of a float32 parameter can be stale, and is not to be read
    optimizer = {
        prefix + key: main[key] if stored[key].dtype != torch.float32 else main[key] + 1
        for key in main
    }
    return stored | optimizer, main


@pytest.mark.parametrize(
    "prefix", ["optimizer.state.param.", "optimizer.state.fp32_param."], ids=["sharded", "plain"]
)
def test_float32_takes_the_main_parameters(tmp_path: Path, prefix: str) -> None:
    config = toy_config(mtp_num_hidden_layers=1)
    hf = random_model(config, torch.bfloat16)
    tensors, main = with_main_parameters(hf_to_mcore(config, hf), prefix)
    run = write_training_checkpoint(tmp_path / "run", tensors, config)
    ok(ckpt("export", run, tmp_path / "f32", "--dtype", "float32"))
    result = read_all(tmp_path / "f32")
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    back = hf_to_mcore(config, result)
    assert all(torch.equal(back[key], main[key]) for key in main)
    # transformers loads everything in the dtype that the config names
    assert json.loads((tmp_path / "f32" / "config.json").read_text())["dtype"] == "float32"
    ok(ckpt("export", run, tmp_path / "stored", "--dtype", "checkpoint"))
    stored = hf_to_mcore(config, read_all(tmp_path / "stored"))
    name = "decoder.layers.0.mlp.router.weight"
    assert torch.equal(stored[name], main[name].bfloat16())


def test_a_float32_original_gets_main_parameters_without_asking(
    toys: dict[str, Path], tmp_path: Path
) -> None:
    config = toy_config(mtp_num_hidden_layers=1)
    reference = random_model(config, torch.float32)
    from tests.helpers.hf_toy import save_folder

    save_folder(tmp_path / "reference", reference, config)
    half = random_model(config, torch.bfloat16)
    tensors, main = with_main_parameters(hf_to_mcore(config, half), "optimizer.state.param.")
    run = write_training_checkpoint(tmp_path / "run", tensors, config)
    ok(ckpt("export", run, tmp_path / "hf", "--reference", tmp_path / "reference"))
    back = hf_to_mcore(config, read_all(tmp_path / "hf"))
    assert all(torch.equal(back[key], main[key]) for key in main)


def test_float32_without_main_parameters_is_refused(tmp_path: Path) -> None:
    config = toy_config()
    tensors = hf_to_mcore(config, random_model(config, torch.bfloat16))
    run = write_training_checkpoint(tmp_path / "run", tensors, config)
    refused(ckpt("export", run, tmp_path / "hf", "--dtype", "float32"), "main parameter")


def test_an_import_in_float32_is_the_same_numbers(toys: dict[str, Path], tmp_path: Path) -> None:
    source = toys["qwen3_5_moe_text"]
    ok(ckpt("import", source, tmp_path / "m"))
    ok(ckpt("export", tmp_path / "m", tmp_path / "hf", "--dtype", "float32"))
    result = read_all(tmp_path / "hf")
    for name, tensor in read_all(source).items():
        assert torch.equal(result[name], tensor.float())


def test_a_run_from_an_import_needs_no_flags(toys: dict[str, Path], tmp_path: Path) -> None:
    """The run folder holds a copy of the origin folder, as the training script leaves it."""
    import shutil

    from checkpoint_tools.mcore.read import MegatronCheckpoint

    source = toys["qwen3_5_moe"]
    ok(ckpt("import", source, tmp_path / "m"))
    imported = MegatronCheckpoint(tmp_path / "m")
    origin = imported.argument("qwen35_origin")
    config = Qwen35Config.from_hf(json.loads(imported.argument("qwen35_hf_config")))
    trained = {
        name: tensor + 1 if tensor.dim() > 1 else tensor
        for name, tensor in read_all(source).items()
        if not name.startswith("model.visual.")
    }
    run = write_training_checkpoint(
        tmp_path / "run", hf_to_mcore(config, trained), config, qwen35_origin=origin
    )
    shutil.copytree(tmp_path / "m" / origin, run / origin)
    shutil.rmtree(tmp_path / "m")
    ok(ckpt("export", run, tmp_path / "hf"))
    before, after = read_all(source), read_all(tmp_path / "hf")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        expected = trained.get(name, tensor)
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], expected), name
    assert (tmp_path / "hf/config.json").read_bytes() == (source / "config.json").read_bytes()


def test_unknown_model_tensors_are_refused(tmp_path: Path) -> None:
    config = toy_config()
    tensors = hf_to_mcore(config, random_model(config, torch.bfloat16))
    tensors["decoder.layers.0.mlp.router.expert_bias"] = torch.zeros(8)
    run = write_training_checkpoint(tmp_path / "run", tensors, config)
    refused(ckpt("export", run, tmp_path / "hf"), "router.expert_bias")


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    config = toy_config()
    tensors = hf_to_mcore(config, random_model(config, torch.bfloat16))
    run = write_training_checkpoint(
        tmp_path / "run", tensors, toy_config(shared_expert_intermediate_size=50)
    )
    refused(ckpt("export", run, tmp_path / "hf"), "another shape", "shared_experts")


def test_a_checkpoint_that_says_nothing_about_its_model(
    toys: dict[str, Path], tmp_path: Path
) -> None:
    source = toys["qwen3_5_text"]
    config = Qwen35Config.from_hf(source)
    run = write_training_checkpoint(tmp_path / "run", hf_to_mcore(config, read_all(source)), None)
    refused(ckpt("export", run, tmp_path / "hf"), "--reference")
    ok(ckpt("export", run, tmp_path / "hf", "--reference", source))
    ok(ckpt("verify", source, tmp_path / "hf"))


def test_trained_without_the_mtp_layer_of_the_original(
    toys: dict[str, Path], tmp_path: Path
) -> None:
    from dataclasses import replace

    source = toys["qwen3_5_text"]
    config = replace(Qwen35Config.from_hf(source), mtp_num_hidden_layers=0)
    tensors = {n: t for n, t in read_all(source).items() if not n.startswith("mtp.")}
    run = write_training_checkpoint(tmp_path / "run", hf_to_mcore(config, tensors), config)
    export = ("export", run, tmp_path / "hf", "--reference", source)
    refused(ckpt(*export), "--no-mtp")
    ok(ckpt(*export, "--no-mtp"))
    assert read_all(tmp_path / "hf").keys() == tensors.keys()
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["mtp_num_hidden_layers"] == 0


def test_a_stock_megatron_checkpoint(toys: dict[str, Path], tmp_path: Path) -> None:
    """Zero-centred norm in bfloat16, padded vocabulary, nothing of ours in its arguments."""
    source = toys["qwen3_5_moe_text"]
    config = Qwen35Config.from_hf(source)
    norm = "linear_attn.norm.weight"
    hf = {
        name: torch.full_like(tensor, 1.25) if name.endswith(norm) else tensor
        for name, tensor in read_all(source).items()
    }
    tensors = hf_to_mcore(config, hf, "mcore")
    tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    key = "embedding.word_embeddings.weight"
    tensors[key] = torch.cat([tensors[key], torch.ones(128, 64).bfloat16()])
    run = write_training_checkpoint(tmp_path / "run", tensors, None)
    ok(ckpt("export", run, tmp_path / "hf", "--reference", source))
    result = read_all(tmp_path / "hf")
    for name, tensor in hf.items():
        assert result[name].dtype == tensor.dtype
        # A_log went through bfloat16 there
        expected = tensor.bfloat16().to(tensor.dtype)
        assert torch.equal(result[name], expected), name


def test_common_state_of_older_megatron(tmp_path: Path) -> None:
    """common.pt beside the tensors, as before megatron-core 0.19."""
    config = toy_config()
    hf = random_model(config, torch.bfloat16)
    run = write_training_checkpoint(tmp_path / "run", hf_to_mcore(config, hf), config, legacy=True)
    assert (run / "iter_0000007" / "common.pt").exists()
    ok(ckpt("export", run, tmp_path / "hf"))
    assert read_all(tmp_path / "hf").keys() == hf.keys()


def test_a_reference_that_transformers_saved_without_mtp(
    toys: dict[str, Path], tmp_path: Path
) -> None:
    """The trained MTP layer is exported although the reference lost its own."""
    import shutil

    from tests.helpers.hf_toy import rewrite

    source = tmp_path / "source"
    shutil.copytree(toys["qwen3_5_text"], source)
    config = Qwen35Config.from_hf(source)
    complete = read_all(source)
    rewrite(source, lambda ts: {n: t for n, t in ts.items() if not n.startswith("mtp.")})
    run = write_training_checkpoint(tmp_path / "run", hf_to_mcore(config, complete), config)
    ok(ckpt("export", run, tmp_path / "hf", "--reference", source))
    assert read_all(tmp_path / "hf").keys() == complete.keys()
