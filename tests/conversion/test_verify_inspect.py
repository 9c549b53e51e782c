"""verify finds every kind of difference; inspect says what a folder is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools.table.names import Naming, hf_to_mcore, rows
from tests.helpers.ckpt_cli import ckpt, ok, refused
from tests.helpers.hf_toy import read_all, rewrite
from tests.helpers.mcore_toy import write_training_checkpoint
from tests.helpers.toys import toy_config

NAME = "model.layers.1.linear_attn.in_proj_qkv.weight"


def verify(*arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit status and report."""
    outcome = ckpt("verify", *arguments, "--json")
    return outcome.code, json.loads(outcome.out)


def flip_one_bit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    changed = tensors[NAME].clone()
    changed.view(torch.int16)[3, 5] ^= 1
    return tensors | {NAME: changed}


@pytest.fixture
def pair(copy_of: Callable[[str], Path], toys: dict[str, Path], tmp_path: Path) -> list[Path]:
    """A toy and a Megatron checkpoint of it."""
    source = copy_of("qwen3_5_moe_text")
    ok(ckpt("import", source, tmp_path / "m"))
    return [source, tmp_path / "m"]


@pytest.mark.parametrize("order", [1, -1])
def test_one_flipped_bit(pair: list[Path], order: int) -> None:
    rewrite(pair[0], flip_one_bit)
    code, report = verify(*pair[::order])
    assert code == 1
    assert not report["equal"]
    (difference,) = report["differences"]
    assert (difference["name"], difference["what"], difference["elements"]) == (NAME, "values", 1)
    assert 0 < difference["largest"] < 1


def test_another_dtype(pair: list[Path]) -> None:
    rewrite(pair[0], lambda tensors: tensors | {NAME: tensors[NAME].float()})
    code, report = verify(*pair)
    (difference,) = report["differences"]
    assert code == 1
    assert [difference[key] for key in ("what", "first", "second")] == [
        "dtype",
        "float32",
        "bfloat16",
    ]


def test_another_shape(pair: list[Path]) -> None:
    rewrite(pair[0], lambda tensors: tensors | {NAME: tensors[NAME].flatten()})
    code, report = verify(*pair)
    assert code == 1
    assert report["differences"][0]["what"] == "shape"


def test_missing_and_extra_tensors(pair: list[Path]) -> None:
    rewrite(
        pair[0],
        lambda tensors: {n: t for n, t in tensors.items() if n != NAME} | {"more": torch.ones(1)},
    )
    code, report = verify(*pair)
    assert code == 1
    assert (report["missing"], report["extra"]) == (["more"], [NAME])
    assert report["differences"] == []
    printed = ckpt("verify", *pair).out
    assert "missing  more" in printed
    assert f"extra    {NAME}" in printed
    assert "DIFFERENT" in printed


def test_bits_are_compared_not_numbers(tmp_path: Path) -> None:
    config = toy_config(moe=False)
    hf = {
        spec.name: torch.zeros(spec.shape)
        for row in rows(config, Naming.default(config))
        for spec in row.hf
    }
    name = "model.norm.weight"
    hf[name] = torch.full_like(hf[name], torch.nan)
    for folder, tensors in (
        ("a", hf),
        ("nan", hf | {name: hf[name].clone()}),
        ("zero", hf | {NAME: -hf[NAME]}),
    ):
        write_training_checkpoint(tmp_path / folder, hf_to_mcore(config, tensors), config)
    assert verify(tmp_path / "a", tmp_path / "nan")[0] == 0
    code, report = verify(tmp_path / "a", tmp_path / "zero")
    assert code == 1
    assert len(report["differences"]) == 3  # query, key and value
    assert all(one["largest"] == 0 for one in report["differences"])


def test_two_megatron_checkpoints_by_key_with_optimizer_state(tmp_path: Path) -> None:
    config = toy_config(moe=False)
    hf = {
        spec.name: torch.ones(spec.shape)
        for row in rows(config, Naming.default(config))
        for spec in row.hf
    }
    tensors = hf_to_mcore(config, hf)
    key = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
    state = {key: torch.ones(64)}
    write_training_checkpoint(tmp_path / "a", tensors | state, config, axis=0)
    write_training_checkpoint(tmp_path / "b", tensors | state, config, axis=-1)
    assert verify(tmp_path / "a", tmp_path / "b")[0] == 0
    write_training_checkpoint(tmp_path / "c", tensors | {key: torch.zeros(64)}, config)
    assert [one["name"] for one in verify(tmp_path / "a", tmp_path / "c")[1]["differences"]] == [
        key
    ]
    write_training_checkpoint(tmp_path / "d", tensors, config)
    assert verify(tmp_path / "a", tmp_path / "d")[1]["missing"] == [key]
    for other in "cd":
        code, report = verify(tmp_path / "a", tmp_path / other, "--weights-only")
        assert code == 0
        assert report["tensors"] == len(tensors)


def test_a_vision_tensor_counts(copy_of: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy_of("qwen3_5")
    ok(ckpt("import", source, tmp_path / "m"))
    name = next(name for name in read_all(source) if name.startswith("model.visual."))
    rewrite(source, lambda tensors: tensors | {name: tensors[name] + 1})
    assert [one["name"] for one in verify(source, tmp_path / "m")[1]["differences"]] == [name]


def inspect(folder: Path, code: int = 0) -> dict[str, Any]:
    """The report, and the exit status that belongs to it."""
    outcome = ckpt("inspect", folder, "--json")
    assert outcome.code == code, outcome
    return dict(json.loads(outcome.out))


def test_inspect_a_hugging_face_folder(toys: dict[str, Path]) -> None:
    facts = inspect(toys["qwen3_5_moe"])
    assert facts["kind"] == "Hugging Face folder"
    assert facts["complete"] is True
    assert facts["model_type"] == "qwen3_5_moe"
    assert facts["tensors"] == len(read_all(toys["qwen3_5_moe"]))
    assert facts["mtp"] is True
    assert facts["vision_tensors"] > 0
    assert set(facts["dtypes"]) == {"bfloat16", "float32"}
    assert "complete" in ok(ckpt("inspect", toys["qwen3_5_moe"])).out


def test_inspect_an_import(toys: dict[str, Path], tmp_path: Path) -> None:
    ok(ckpt("import", toys["qwen3_5_moe"], tmp_path / "m", "--layout", "mcore"))
    facts = inspect(tmp_path / "m")
    assert facts["iteration"] == 0
    assert facts["checkpoint_version"] == 3.0
    assert facts["gdn_layout"] == "mcore"
    assert facts["optimizer_tensors"] == 0
    assert facts["origin_present"] is True


def test_inspect_a_training_checkpoint(tmp_path: Path) -> None:
    config = toy_config()
    hf = {
        spec.name: torch.ones(spec.shape)
        for row in rows(config, Naming.default(config))
        for spec in row.hf
    }
    tensors = hf_to_mcore(config, hf) | {"optimizer.state.param.x": torch.ones(2)}
    sizes = {"tensor_model_parallel_size": 4, "expert_model_parallel_size": 8}
    run = write_training_checkpoint(tmp_path / "run", tensors, config, **sizes)
    facts = inspect(run)
    assert facts["iteration"] == 7
    assert facts["saved_with"] == {"tp": 4, "ep": 8}
    assert facts["optimizer_tensors"] == 1
    (run / "iter_0000007" / "__0_0.distcp").unlink()
    assert "__0_0.distcp" in inspect(run, code=1)["problem"]


def test_inspect_names_the_flavor(tmp_path: Path) -> None:
    from qwen35_mcore.config.flavors import get_flavor

    config = get_flavor("tiny-dense")
    hf = {
        spec.name: torch.zeros(spec.shape)
        for row in rows(config, Naming.default(config))
        for spec in row.hf
    }
    write_training_checkpoint(tmp_path / "run", hf_to_mcore(config, hf), config)
    assert inspect(tmp_path / "run")["flavor"] == "tiny-dense"


def test_inspect_something_else(tmp_path: Path) -> None:
    refused(ckpt("inspect", tmp_path), "neither", "allowed: ", "fix: ")


@pytest.mark.parametrize("command", ["inspect", "verify", "export", "import"])
def test_a_path_that_is_no_folder(command: str, toys: dict[str, Path], tmp_path: Path) -> None:
    other = {"inspect": [], "verify": [toys["qwen3_5_moe"]]}.get(command, [tmp_path / "out"])
    missing, file = tmp_path / "missing", tmp_path / "file"
    file.write_text("")
    refused(ckpt(command, missing, *other), f"there is no such folder\n  got: {missing}", "fix: ")
    refused(ckpt(command, file, *other), f"this is a file, not a folder\n  got: {file}", "fix: ")


def test_an_import_that_was_interrupted_is_named(tmp_path: Path) -> None:
    (tmp_path / "m.partial").mkdir()
    refused(ckpt("export", tmp_path / "m", tmp_path / "out"), f"is in {tmp_path / 'm.partial'}")
