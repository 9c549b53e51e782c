"""An imported checkpoint is the model that transformers runs, at any parallel layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen35_mcore.config.model_config import Qwen35Config
from tests.conversion import cases
from tests.helpers.ckpt_cli import ckpt, ok
from tests.helpers.distributed import CaseError, WorkerPool
from tests.helpers.hf_reference import model_class
from tests.helpers.hf_toy import pack_experts, rewrite, write_toy
from tests.helpers.kinds import kinds
from tests.helpers.training import Layout

TOLERANCE = 5e-6
LAYOUTS = {
    "tp1": (1, Layout()),
    "tp2 pp2 ep2": (4, Layout(tp=2, pp=2, ep=2)),
    "pp2 vpp2": (2, Layout(pp=2, vpp=2)),
    "tp2 ep4 etp1": (4, Layout(tp=2, ep=4)),
    "tp2 etp2": (2, Layout(tp=2, etp=2)),
}
DENSE = {"tp1": LAYOUTS["tp1"], "tp2 pp2": (4, Layout(tp=2, pp=2))}
SOURCES: dict[str, dict[str, Any]] = {
    "qwen3_5_moe_text": {"kind": "qwen3_5_moe_text"},
    "qwen3_5_moe": {"kind": "qwen3_5_moe"},
    "qwen3_5_text": {"kind": "qwen3_5_text"},
    "qwen3_5 tied, no mtp": {"kind": "qwen3_5", "tied": True, "mtp": False},
    "qwen3_5_text tied": {"kind": "qwen3_5_text", "tied": True},
    "qwen3_next": {"kind": "qwen3_next"},
}


def reference_logits(folder: Path, config: Qwen35Config, tokens: torch.Tensor) -> torch.Tensor:
    """What transformers computes from the source folder, ``[b, s, vocabulary]`` float32."""
    model = model_class(config).from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


def tokens_for(vocabulary: int) -> torch.Tensor:
    """Two rows of a length that no chunk divides."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, vocabulary, (2, 38), generator=generator)


def assert_same(answers: list[dict[str, Any]], reference: torch.Tensor) -> None:
    """Logits within the tolerance, everything asked for was there, nothing but states left over."""
    logits = [answer["logits"] for answer in answers if answer["logits"] is not None]
    assert logits
    for one in logits:
        assert (one - reference).abs().max() <= TOLERANCE * reference.abs().max()
    for answer in answers:
        assert not answer["lacking"]
        assert all("_extra_state" in str(key) for key in answer["not_asked"])


@pytest.mark.parametrize("source", kinds(SOURCES, ("qwen3_5_moe", "qwen3_5_text tied")))
def test_logits_of_an_import(tmp_path: Path, pool: WorkerPool, source: str) -> None:
    config = write_toy(tmp_path / "hf", dtype=torch.float32, **SOURCES[source])
    ok(ckpt("import", tmp_path / "hf", tmp_path / "m"))
    tokens = tokens_for(config.vocab_size)
    reference = reference_logits(tmp_path / "hf", config, tokens)
    for world, layout in (LAYOUTS if config.is_moe else DENSE).values():
        answers = pool.run(
            cases.imported_logits,
            world,
            model_config=config,
            checkpoint=str(tmp_path / "m" / "release"),
            tokens=tokens,
            layout=layout,
        )
        assert_same(answers, reference)


def test_packed_experts_give_the_same_logits(tmp_path: Path, pool: WorkerPool) -> None:
    config = write_toy(tmp_path / "hf", "qwen3_5_moe_text", dtype=torch.float32)
    tokens = tokens_for(config.vocab_size)
    reference = reference_logits(tmp_path / "hf", config, tokens)
    rewrite(tmp_path / "hf", pack_experts)
    ok(ckpt("import", tmp_path / "hf", tmp_path / "m"))
    world, layout = LAYOUTS["tp2 pp2 ep2"]
    checkpoint = str(tmp_path / "m" / "release")
    answers = pool.run(
        cases.imported_logits,
        world,
        model_config=config,
        checkpoint=checkpoint,
        tokens=tokens,
        layout=layout,
    )
    assert_same(answers, reference)


@pytest.mark.parametrize(
    "kind", kinds(("qwen3_5_moe", "qwen3_5_text", "qwen3_next"), ("qwen3_5_moe",))
)
def test_the_stock_layout_loads_into_megatrons_own_model(
    tmp_path: Path, pool: WorkerPool, kind: str
) -> None:
    config = write_toy(tmp_path / "hf", kind, dtype=torch.float32)
    ok(ckpt("import", tmp_path / "hf", tmp_path / "m", "--layout", "mcore"))
    tokens = tokens_for(config.vocab_size)
    reference = reference_logits(tmp_path / "hf", config, tokens)
    for tp in (1, 2):
        answers = pool.run(
            cases.native_logits,
            tp,
            model_config=config,
            checkpoint=str(tmp_path / "m" / "release"),
            tokens=tokens,
            layout=Layout(tp=tp, run={"deterministic_mode": True}),
        )
        assert_same(answers, reference)


def test_a_native_checkpoint_is_not_taken_for_ours(tmp_path: Path, pool: WorkerPool) -> None:
    """Its norm is off by one: under another key, so that loading it shows what is missing."""
    config = write_toy(tmp_path / "hf", "qwen3_5_text", dtype=torch.float32)
    ok(ckpt("import", tmp_path / "hf", tmp_path / "m", "--layout", "mcore"))
    checkpoint, tokens = str(tmp_path / "m" / "release"), tokens_for(config.vocab_size)
    with pytest.raises(CaseError, match=r"Missing key.*gated_norm\.weight"):
        pool.run(
            cases.imported_logits,
            1,
            model_config=config,
            checkpoint=checkpoint,
            tokens=tokens,
            layout=Layout(),
        )
