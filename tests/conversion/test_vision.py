"""The vision tower: converted for a run that trains it, carried for a run of text alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.mcore.read import MegatronCheckpoint
from checkpoint_tools.table.names import hf_to_mcore
from qwen35_mcore.config.counts import vision_parameters
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from tests.conversion import cases
from tests.conversion.test_roundtrip import assert_same_folder
from tests.conversion.test_same_model import assert_same, reference_logits, tokens_for
from tests.helpers.ckpt_cli import ckpt, ok, refused
from tests.helpers.distributed import WorkerPool
from tests.helpers.hf_reference import load_pretrained
from tests.helpers.hf_toy import (
    VISION,
    edit_config,
    read_all,
    rewrite,
    toy_hf_config,
    write_toy,
)
from tests.helpers.kinds import kinds
from tests.helpers.mcore_toy import write_training_checkpoint
from tests.helpers.training import Layout

CLASSES = ("qwen3_5", "qwen3_5_moe", "qwen3_5_moe-packed")


@pytest.mark.parametrize("kind", kinds(CLASSES, ("qwen3_5_moe",)))
def test_import_with_the_tower_then_export_gives_the_folder_back(
    toys: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Text-only folders, and towers that are carried: `test_roundtrip`."""
    source, run = toys[kind], tmp_path / "m"
    report = json.loads(ok(ckpt("import", source, run, "--vision", "--json")).out)
    assert report["carried"] == 0
    tower = [name for name in read_all(source) if name.startswith("model.visual.")]
    facts = json.loads(ok(ckpt("inspect", run, "--json")).out)
    assert facts["vision_tensors"] == len(tower) > 0
    counted = vision_parameters(VisionConfig.of(toy_hf_config(kind.removesuffix("-packed"))))
    assert facts["vision_parameters"] == counted
    ok(ckpt("export", run, tmp_path / "hf"))
    assert_same_folder(source, tmp_path / "hf")
    ok(ckpt("verify", source, run))
    ok(ckpt("verify", tmp_path / "hf", source))


@pytest.mark.parametrize("layout", [Layout(vision=True), Layout(vision=True, tp=2, ep=2)])
@pytest.mark.exhaustive
def test_the_import_is_the_model_that_transformers_runs(
    tmp_path: Path, pool: WorkerPool, layout: Layout
) -> None:
    """Every tensor of the tower is found; what it computes: tests/parity/test_vision.py."""
    config = write_toy(tmp_path / "hf", "qwen3_5_moe", dtype=torch.float32)
    ok(ckpt("import", tmp_path / "hf", tmp_path / "m", "--vision"))
    tokens = tokens_for(config.vocab_size).clamp(min=7)  # no image token
    answers = pool.run(
        cases.imported_logits,
        layout.tp,
        model_config=config,
        checkpoint=str(tmp_path / "m" / "release"),
        tokens=tokens,
        layout=layout,
    )
    assert_same(answers, reference_logits(tmp_path / "hf", config, tokens))
    assert not any("vision_model" in str(key) for key in answers[0]["not_asked"] if is_used(key))


def is_used(key: Any) -> bool:
    """Whether a module of this release keeps a state under the key."""
    return "core_attention" not in str(key)


@pytest.mark.parametrize("tower_was_carried", kinds((True, False), ("True",)))
def test_a_tower_that_trained_is_exported(
    toys: dict[str, Path], tmp_path: Path, tower_was_carried: bool
) -> None:
    """Whatever the original beside it holds."""
    config, source = toy_hf_config("qwen3_5"), toys["qwen3_5"]
    before = read_all(source)
    trained = {
        name: tensor + 1 if name.startswith("model.visual.") else tensor
        for name, tensor in before.items()
    }
    ok(ckpt("import", source, tmp_path / "run", *([] if tower_was_carried else ["--vision"])))
    carried = next((tmp_path / "run").glob("qwen35-origin-*")).name
    tensors = hf_to_mcore(config, trained, vision=True)
    run = write_training_checkpoint(tmp_path / "new", tensors, config, qwen35_origin=carried)
    (tmp_path / "run" / carried).rename(run / carried)
    for name, arguments in (("a", []), ("b", ["--reference", source])):
        ok(ckpt("export", run, tmp_path / name, *arguments))
        after = read_all(tmp_path / name)
        assert after.keys() == trained.keys()
        assert all(torch.equal(after[name], trained[name]) for name in trained)


@pytest.mark.parametrize("kind", kinds(CLASSES[:2], ("qwen3_5_moe",)))
def test_a_run_that_never_saw_an_import_exports_its_tower(
    toys: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Every tensor, under the names of the vision-language class; and back without a difference."""
    config, tensors = toy_hf_config(kind), read_all(toys[kind])
    run = write_training_checkpoint(
        tmp_path / "run", hf_to_mcore(config, tensors, vision=True), config
    )
    ok(ckpt("export", run, tmp_path / "hf"))
    exported = read_all(tmp_path / "hf")
    tower = {name: tensor for name, tensor in tensors.items() if ".visual." in name}
    assert all(torch.equal(exported[name], tower[name]) for name in tower)
    assert Qwen35Config.from_hf(tmp_path / "hf").carried_outer["vision_config"] == VISION
    ok(ckpt("import", tmp_path / "hf", tmp_path / "again", "--vision"))
    ok(ckpt("verify", tmp_path / "hf", tmp_path / "again"))
    ok(ckpt("verify", tmp_path / "hf", run))


@pytest.fixture(scope="module")
def trained(toys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained a tower and carried nothing."""
    config = toy_hf_config("qwen3_5")
    tensors = hf_to_mcore(config, read_all(toys["qwen3_5"]), vision=True)
    return write_training_checkpoint(tmp_path_factory.mktemp("trained") / "run", tensors, config)


def test_a_tower_that_trained_is_not_exported_as_text(
    toys: dict[str, Path], trained: Path, tmp_path: Path
) -> None:
    hf = tmp_path / "hf"
    says = ("holds a vision tower", "vision-language folder with --reference")
    refused(ckpt("export", trained, hf, "--reference", toys["qwen3_5_text"]), *says)
    ok(ckpt("export", trained, hf, "--reference", toys["qwen3_5"]))  # what it says to do
    load_pretrained(hf, text_only=True)


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        ({"vision_config": VISION | {"num_heads": 4}}, ("num_heads 4", "num_heads 2")),
        ({"image_token_id": 7}, ("image_token_id 7", "image_token_id 5")),
    ],
    ids=("heads", "token"),
)
def test_a_tower_is_of_what_it_trained_with(
    copy_of: Any, trained: Path, tmp_path: Path, change: dict[str, Any], mentions: tuple[str, ...]
) -> None:
    """No shape says either, and heads decide which rows are queries: export refuses another
    config, and verify calls it a difference."""
    source = copy_of("qwen3_5")
    edit_config(source, **change)
    says = ("another vision tower", "--reference", *mentions)
    refused(ckpt("export", trained, tmp_path / "out", "--reference", source), *says)
    edit_config(source, vision_config=VISION | {"initializer_range": 0.1}, image_token_id=5)
    ok(ckpt("export", trained, tmp_path / "out", "--reference", source))
    edit_config(source, **change)
    compared = json.loads(ckpt("verify", source, tmp_path / "out", "--json").out)
    assert not compared["equal"]
    assert [one.split(":")[0] for one in compared["config"]] == [f"vision {mentions[0].split()[0]}"]


def test_a_run_of_text_alone_from_an_import_with_the_tower(
    toys: dict[str, Path], tmp_path: Path
) -> None:
    """Its checkpoints would have no tower, and the import kept none: nothing is written."""
    config, source = toy_hf_config("qwen3_5"), toys["qwen3_5"]
    ok(ckpt("import", source, tmp_path / "run", "--vision"))
    carried = next((tmp_path / "run").glob("qwen35-origin-*")).name
    tensors = hf_to_mcore(config, read_all(source))
    run = write_training_checkpoint(tmp_path / "new", tensors, config, qwen35_origin=carried)
    (tmp_path / "run" / carried).rename(run / carried)
    refused(ckpt("export", run, tmp_path / "hf"), "has no vision tower", "--reference")
    ok(ckpt("export", run, tmp_path / "hf", "--reference", source))
    assert_same_folder(source, tmp_path / "hf")


@pytest.mark.exhaustive
def test_a_run_refuses_an_import_for_other_runs(
    toys: dict[str, Path], tmp_path: Path, pool: WorkerPool
) -> None:
    for name, flags in (("text", []), ("vision", ["--vision"])):
        ok(ckpt("import", toys["qwen3_5"], tmp_path / name, *flags))
    config = toy_hf_config("qwen3_5")

    def error(name: str, vision: bool, config: Qwen35Config = config) -> str:
        folder = str(tmp_path / name)
        [message] = pool.run(start_error, 1, folder=folder, config=config, vision=vision)
        return message

    assert error("text", False) == error("vision", True) == ""
    message = error("vision", False)
    assert "holds a vision tower" in message
    assert "without --vision" in message
    assert "`qwen35-ckpt import --vision`" in error("text", True)
    tower = config.carried_outer["vision_config"] | {"num_heads": 4}
    other = replace(config, carried_outer=config.carried_outer | {"vision_config": tower})
    message = error("vision", True, other)
    assert "of a different vision tower" in message
    assert "got: num_heads 2" in message


def start_error(folder: str, config: Qwen35Config, vision: bool) -> str:
    """What training says of a checkpoint to start from, in a pool worker."""
    from argparse import Namespace

    from qwen35_mcore.errors import CheckpointError
    from qwen35_mcore.training.checks.checkpoint import check_start

    args = Namespace(
        load=None,
        save=None,
        ckpt_step=None,
        pretrained_checkpoint=folder,
        finetune=False,
        rank=0,
        qwen35_vision=vision,
    )
    try:
        check_start(args, config)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.exhaustive
def test_an_import_says_what_it_is(toys: dict[str, Path], tmp_path: Path) -> None:
    ok(ckpt("import", toys["qwen3_5"], tmp_path / "text"))
    ok(ckpt("import", toys["qwen3_5"], tmp_path / "vision", "--vision"))
    said = [MegatronCheckpoint(tmp_path / name).argument("qwen35_vision") for name in
            ("text", "vision")]  # fmt: skip
    assert said == [None, True]


@pytest.mark.exhaustive
def test_where_a_tensor_of_the_tower_goes(toys: dict[str, Path], tmp_path: Path) -> None:
    name = "model.visual.blocks.1.attn.qkv.bias"
    explain = ("import", toys["qwen3_5"], tmp_path / "m", "--explain", name)
    said = ok(ckpt(*explain, "--vision")).out
    assert "vision_model.decoder.layers.1.self_attention.linear_qkv.bias" in said
    assert "per head: the query, the key, the value" in said
    assert "carried through" in ok(ckpt(*explain)).out


def test_what_has_no_tower_to_convert_is_refused(toys: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "m"
    says = ("has no vision tower", "drop --vision")
    refused(ckpt("import", toys["qwen3_5_text"], run, "--vision"), *says)
    refused(ckpt("import", toys["qwen3_5"], run, "--vision", "--layout", "mcore"), "drop --vision")
    assert not run.exists()


def test_a_config_that_contradicts_the_tensors_is_refused(copy_of: Any, tmp_path: Path) -> None:
    source = copy_of("qwen3_5")
    vision = json.loads((source / "config.json").read_text())["vision_config"]
    for change, mentions in (
        ({"depth": 3}, ("blocks.2", "missing")),
        ({"depth": 1}, ("blocks.1", "beyond config.json's vision_config.depth")),
        ({"hidden_size": 40}, ("patch_embed.proj", "another shape")),
        ({"intermediate_size": 52}, ("mlp.linear_fc1", "another shape")),
        ({"patch_size": 8}, ("patch_embed.proj", "another shape")),
        ({"num_position_embeddings": 25}, ("pos_embed", "another shape")),
        ({"spatial_merge_size": 1}, ("merger.linear_fc1", "another shape")),
        ({"deepstack_visual_indexes": [1]}, ("deepstack_visual_indexes", "does not have")),
        ({"out_hidden_size": 32}, ("out_hidden_size", "hidden_size")),
        ({"window_size": 7}, ("unknown key", "window_size")),
    ):
        edit_config(source, vision_config=vision | change)
        refused(ckpt("import", source, tmp_path / "m", "--vision"), *mentions)
        facts = json.loads(ok(ckpt("inspect", source, "--json")).out)
        assert all(mention in facts["notes"][0] for mention in mentions)
    ok(ckpt("import", source, tmp_path / "m"))  # carried unread


@pytest.mark.exhaustive
def test_a_tower_with_too_many_tensors_is_refused(copy_of: Any, tmp_path: Path) -> None:
    source = copy_of("qwen3_5")
    extra = {"model.visual.deepstack_merger_list.0.norm.weight": torch.zeros(2)}
    rewrite(source, lambda tensors: tensors | extra)
    refused(ckpt("import", source, tmp_path / "m", "--vision"), "deepstack_merger_list")
    rewrite(source, lambda tensors: {k: v for k, v in tensors.items() if k not in extra})
    for token in (5, 6, 10**6):
        edit_config(source, image_token_id=token, video_token_id=6)
        outcome = ckpt("import", source, tmp_path / "m", "--vision")
        refused(outcome, "token_id") if token != 5 else ok(outcome)
