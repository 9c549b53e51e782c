"""From an import through training to an export: transformers sees the loss that Megatron logged."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from checkpoint_tools.mcore.extra_state import extra_state_keys
from checkpoint_tools.mcore.read import MegatronCheckpoint
from checkpoint_tools.table.names import Naming, rows
from qwen35_mcore.config.model_config import Qwen35Config
from tests.helpers.ckpt_cli import ckpt, ok
from tests.helpers.hf_reference import load_pretrained, model_class
from tests.helpers.hf_toy import read_all, write_toy
from tests.helpers.kinds import kinds
from tests.helpers.pretrain_runs import script_server

LENGTH, SAMPLES, STEPS = 64, 8, 5
PARALLEL = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
PARALLEL += "--expert-model-parallel-size 2 --expert-tensor-parallel-size 1"


@dataclass(frozen=True)
class World:
    """A float32 source, its import, and the two datasets."""

    root: Path
    config: Qwen35Config

    @property
    def source(self) -> Path:
        return self.root / "hf"

    @property
    def imported(self) -> Path:
        return self.root / "m"

    def train(self, save: Path, flags: str, world_size: int, steps: int = STEPS) -> str:
        """Train from the import as a user would; returns the log."""
        command = f"""
            --hf-config {self.source} --pretrained-checkpoint {self.imported}
            --load {save} --save {save} --save-interval {steps} --train-iters {steps}
            --train-data-path {self.root / "train"} --valid-data-path {self.root / "valid"}
            --seq-length {LENGTH} --micro-batch-size 1 --global-batch-size 4
            --eval-iters {SAMPLES // 4} --eval-interval 100 --log-interval 1
            --lr-decay-style constant --num-workers 0 --use-distributed-optimizer {flags}
        """
        return script_server().run(command.split(), world_size).output()

    def transformers_loss(self, folder: Path) -> float:
        """Mean cross entropy of the validation set in transformers, computed in float32."""
        model = model_class(self.config).from_pretrained(folder).float().eval()
        tokens = torch.tensor(list((self.root / "valid.txt").read_bytes()))
        rows = torch.stack([tokens[i * LENGTH :][: LENGTH + 1] for i in range(SAMPLES)])
        with torch.no_grad():
            logits = model(input_ids=rows[:, :-1]).logits
        flat = logits.reshape(-1, logits.shape[-1]).double()
        return float(torch.nn.functional.cross_entropy(flat, rows[:, 1:].reshape(-1)))


def make_world(root: Path, kind: str) -> World:
    from qwen35_mcore.data import tokenize

    config = write_toy(root / "hf", kind, dtype=torch.float32, vocab_size=512)
    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefgh", k=5)) for _ in range(40)]
    for name, samples in (("train", 5 * SAMPLES), ("valid", SAMPLES)):
        # one token more than a whole number of samples: each is seen once, whatever the order
        text = " ".join(letters.choices(words, k=samples * LENGTH))[: samples * LENGTH + 1]
        (root / f"{name}.txt").write_text(text)
        tokenize(
            inputs=[root / f"{name}.txt"],
            output_prefix=root / name,
            tokenizer="byte",
            workers=1,
            append_eod=False,
            quiet=True,
        )
    ok(ckpt("import", root / "hf", root / "m"))
    return World(root, config)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("trained"), "qwen3_5_moe")


def validation_loss(log: str) -> float:
    found = re.findall(r"on validation set \| lm loss value: (\S+)", log)
    assert found, log
    return float(found[0])


def export(world: World, run: Path, target: Path, *flags: str) -> dict[str, torch.Tensor]:
    """Export with the source as reference, and read the result."""
    ok(ckpt("export", run, target, "--reference", world.source, *flags))
    return read_all(target)


def test_the_untrained_import_has_transformers_loss(world: World, tmp_path: Path) -> None:
    log = world.train(tmp_path / "run", f"--lr 0 {PARALLEL}", 4, steps=1)
    assert "successfully loaded checkpoint" in log
    assert validation_loss(log) == pytest.approx(world.transformers_loss(world.source), rel=1e-6)


@pytest.fixture(scope="module", params=kinds(("gpt", "hybrid"), ("gpt",)))
def trained(request: pytest.FixtureRequest, world: World) -> tuple[Path, float]:
    """A float32 run at TP2 PP2 EP2 and the validation loss that Megatron logged at its end."""
    run = world.root / request.param
    log = world.train(run, f"--lr 1e-2 --decoder {request.param} {PARALLEL}", 4)
    return run, validation_loss(log)


def test_transformers_sees_the_loss_that_megatron_logged(
    world: World, trained: tuple[Path, float], tmp_path: Path
) -> None:
    run, logged = trained
    result = export(world, run, tmp_path / "hf", "--dtype", "float32")
    before = read_all(world.source)
    assert result.keys() == before.keys()
    changed = [name for name in before if not torch.equal(result[name], before[name].float())]
    assert len(changed) > 0.8 * sum("visual" not in name for name in before)
    assert not any("visual" in name for name in changed)
    assert world.transformers_loss(tmp_path / "hf") == pytest.approx(logged, rel=1e-6)


@pytest.mark.exhaustive
def test_so_it_does_of_qwen3_next(tmp_path: Path) -> None:
    world = make_world(tmp_path, "qwen3_next")
    logged = validation_loss(world.train(tmp_path / "run", f"--lr 1e-2 {PARALLEL}", 4))
    result = export(world, tmp_path / "run", tmp_path / "back", "--dtype", "float32")
    assert result.keys() == read_all(world.source).keys()
    assert world.transformers_loss(tmp_path / "back") == pytest.approx(logged, rel=1e-6)


def test_training_writes_the_states_that_import_writes(trained: tuple[Path, float]) -> None:
    checkpoint = MegatronCheckpoint(trained[0])
    config = Qwen35Config.from_hf(json.loads(checkpoint.argument("qwen35_hf_config")))
    stored = {key for key in checkpoint.objects if "_extra_state/" in key}
    assert stored <= set(extra_state_keys(config, "qwen35"))


def test_the_table_knows_which_axes_training_splits(trained: tuple[Path, float]) -> None:
    checkpoint = MegatronCheckpoint(trained[0])
    config = Qwen35Config.from_hf(json.loads(checkpoint.argument("qwen35_hf_config")))
    for row in rows(config, Naming.default(config)):
        for spec in row.mcore:
            # experts have one tensor-parallel rank in this run, and a box per half of fc1
            expected = {row.tp_axis} - {None} if row.ep_axis is None else {row.ep_axis}
            halves = {1} if row.ep_axis == 0 and "linear_fc1" in spec.name else set()
            cut = {
                axis
                for chunk in checkpoint.tensors[spec.name].chunks
                for axis, length in enumerate(chunk.box.shape)
                if length != spec.shape[axis]
            }
            assert cut - halves == expected, spec.name


def test_a_bf16_run_exports_its_main_parameters(world: World, tmp_path: Path) -> None:
    world.train(tmp_path / "run", "--bf16 --lr 1e-2", 2, steps=2)
    wide = export(world, tmp_path / "run", tmp_path / "wide", "--dtype", "float32")
    stored = export(world, tmp_path / "run", tmp_path / "stored", "--dtype", "checkpoint")
    precise = 0
    for name, tensor in stored.items():
        if "visual" in name:
            continue
        # what is stored is the rounded main parameter; the three of GDN are stored as they are
        assert torch.equal(wide[name].to(tensor.dtype), tensor), name
        precise += not torch.equal(wide[name].bfloat16().float(), wide[name])
    assert precise > 0.8 * len([name for name in stored if "visual" not in name])
    float32 = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert {name.split("linear_attn.")[-1] for name in float32 if "visual" not in name} == {
        "A_log",
        "dt_bias",
        "norm.weight",
    }


def test_a_bf16_run_rounds_a_float32_source_but_for_gdns_three(
    world: World, tmp_path: Path
) -> None:
    """Main parameters begin as copies of the bfloat16 ones; nothing trained, so nothing moved."""
    world.train(tmp_path / "run", "--bf16 --lr 0", 1, steps=1)
    result = export(world, tmp_path / "run", tmp_path / "hf", "--dtype", "float32")
    exact = ("A_log", "dt_bias", "linear_attn.norm.weight")
    for name, tensor in read_all(world.source).items():
        rounded = not name.endswith(exact) and "visual" not in name
        assert torch.equal(result[name], tensor.bfloat16().float() if rounded else tensor), name


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        pytest.param(2, "", id="DP2"),
        pytest.param(4, PARALLEL, id="TP2 PP2 EP2", marks=pytest.mark.exhaustive),
    ],
)
def test_float32_main_params_keep_a_float32_source_exact(
    world: World, tmp_path: Path, world_size: int, layout: str
) -> None:
    """Through a start from the import, a save, and a resume with the same command line."""
    flags = f"--bf16 --lr 0 --float32-main-params --exit-interval 1 {layout}"
    source = read_all(world.source)
    world.train(tmp_path / "run", flags, world_size, steps=2)
    assert "at iteration 1\n" in world.train(tmp_path / "run", flags, world_size, steps=2)
    assert {f.name for f in (tmp_path / "run").glob("iter_*")} == {"iter_0000001", "iter_0000002"}
    wide = export(world, tmp_path / "run", tmp_path / "wide", "--dtype", "float32")
    stored = export(world, tmp_path / "run", tmp_path / "stored", "--dtype", "checkpoint")
    assert wide.keys() == stored.keys() == source.keys()
    for name, tensor in source.items():
        assert torch.equal(wide[name], tensor), name
        assert torch.equal(stored[name], tensor.to(stored[name].dtype)), name
    assert sum(tensor.dtype == torch.bfloat16 for tensor in stored.values()) > len(source) / 2


def test_a_run_copies_what_is_carried(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    world.train(run, "--lr 1e-3", 1, steps=1)
    assert MegatronCheckpoint(run).argument("qwen35_origin")
    ok(ckpt("export", run, tmp_path / "hf"))
    assert read_all(tmp_path / "hf").keys() == read_all(world.source).keys()


def test_a_text_only_save_without_mtp_trains_and_comes_back(world: World, tmp_path: Path) -> None:
    """The text class of a vision-language folder, as text-only fine-tuning leaves it."""
    load_pretrained(world.source, text_only=True).save_pretrained(tmp_path / "hf")
    for path in world.root.glob("*.*"):
        (tmp_path / path.name).symlink_to(path)
    text = World(tmp_path, world.config)
    told = ok(ckpt("import", text.source, text.imported, "--no-mtp")).out
    override = "--override mtp_num_hidden_layers=0"
    assert override in told
    text.train(tmp_path / "run", f"--lr 1e-3 {override}", 1, steps=2)
    ok(ckpt("export", tmp_path / "run", tmp_path / "back"))
    ok(ckpt("verify", tmp_path / "run", tmp_path / "back"))
    before, after = read_all(text.source), read_all(tmp_path / "back")
    assert after.keys() == before.keys()
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    load_pretrained(tmp_path / "back").generate(torch.tensor([[5, 6]]), max_new_tokens=2)
    ok(ckpt("import", tmp_path / "back", tmp_path / "again"))
