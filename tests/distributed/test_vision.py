"""The vision-language model in parallel modes against one process: same losses, same gradients.

Of two data-parallel ranks one has all images and the other none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from checkpoint_tools.table.names import mcore_to_hf
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.model.vision.freeze import PARTS, part_of
from tests.distributed.cases import FULL_RECOMPUTE, SELECTIVE_RECOMPUTE, STATES
from tests.distributed.test_parallel import TOKEN_LOSS_TOLERANCE, assert_equals_serial
from tests.helpers.distributed import CaseError, WorkerPool
from tests.helpers.equivalence import Case, batches, initial_weights, serial_run
from tests.helpers.kinds import kinds
from tests.helpers.reference_model import mean_loss, vision_language_model
from tests.helpers.shards import assemble, load_global
from tests.helpers.training import Layout, train
from tests.helpers.vision import VisionBatch, row, token_types, vision_toy_config

MOE: dict[str, Any] = {"mtp_num_hidden_layers": 1}
DENSE: dict[str, Any] = {"moe": False, "tie_word_embeddings": True}
DENSE_MTP: dict[str, Any] = DENSE | {"mtp_num_hidden_layers": 1}
PLAIN: dict[str, Any] = {}  # MoE without MTP
STEPS = 2
LATER_LOSS_TOLERANCE = 5e-6
"""One step on; parameters of a tower that are a step behind differ by 1e-5."""


def vision(**sizes: Any) -> Layout:
    return Layout(vision=True, **sizes)


CASES = [
    Case("TP2 with SP, DP2, images on one rank", 4, vision(tp=2), MOE),
    Case("DP2, images on one rank", 2, vision(), MOE),
    Case("DP2 dense, overlapped", 2, vision(overlap=True), DENSE),
    Case("DP2 dense, no distributed optimizer", 2, vision(distributed_optimizer=False), DENSE),
    Case("TP2 without SP x PP2", 4, vision(tp=2, pp=2, sp=False), DENSE_MTP),
    Case("TP2 x ETP2", 2, vision(tp=2, etp=2), MOE),
    Case("EP2, images on one rank", 2, vision(ep=2), MOE),
    Case("PP2, overlapped, DP2", 4, vision(pp=2, overlap=True), DENSE_MTP),
    Case("PP2 x VPP2", 2, vision(pp=2, vpp=2), MOE),
    Case("PP4, microbatch of 2", 4, vision(pp=4), MOE, micro_batch_size=2),
    Case("TP2 x PP2 x EP2, full recompute", 4, vision(tp=2, pp=2, ep=2, run=FULL_RECOMPUTE), MOE),
    Case("selective recompute", 1, vision(run=SELECTIVE_RECOMPUTE), MOE),
    Case("CP2 (all-to-all GDN)", 2, vision(cp=2), MOE),
    Case("CP2 (states passed)", 2, vision(cp=2, run=STATES), MOE, micro_batch_size=2),
    Case("CP2 x PP2 dense, no MTP", 4, vision(cp=2, pp=2), DENSE),
    Case("CP2 x PP2 (states passed)", 4, vision(cp=2, pp=2, run=STATES), MOE),
    Case("CP2 x TP2, documents", 4, vision(cp=2, tp=2, packed=True), MOE),
    Case("CP2 x PP2, documents", 4, vision(cp=2, pp=2, packed=True), MOE),
    Case("CP2, documents, microbatch of 2", 2, vision(cp=2, packed=True), MOE, 2),
    Case("EP2, documents", 2, vision(ep=2, packed=True), PLAIN),
    Case("microbatch of 4", 1, vision(), DENSE, micro_batch_size=4),
]

TEXT, TOWER = ("language",), ("vision", "merger")
ALL_BUT_MERGER = ("language", "vision")
FROZEN = [
    Case("PP2 x VPP2, merger alone trains", 2, vision(pp=2, vpp=2, frozen=ALL_BUT_MERGER), MOE),
    Case("PP2 x DP2, overlapped, language frozen", 4,
         vision(pp=2, overlap=True, frozen=TEXT), DENSE_MTP),
    Case("PP2 x DP2, overlapped, tower frozen, full recompute", 4,
         vision(pp=2, overlap=True, frozen=TOWER, run=FULL_RECOMPUTE), MOE),
    Case("PP2, no distributed optimizer, language frozen", 2,
         vision(pp=2, distributed_optimizer=False, frozen=TEXT), MOE),
    Case("PP2, selective recompute, language frozen", 2,
         vision(pp=2, frozen=TEXT, run=SELECTIVE_RECOMPUTE), MOE),
    Case("TP2 x PP2, full recompute, language frozen", 4,
         vision(tp=2, pp=2, frozen=TEXT, run=FULL_RECOMPUTE), MOE),
    Case("TP2 x ETP2, language frozen", 2, vision(tp=2, etp=2, frozen=TEXT), MOE),
    Case("EP2, merger frozen", 2, vision(ep=2, frozen=("merger",)), MOE),
    Case("CP2 (states passed), merger alone trains", 2,
         vision(cp=2, frozen=ALL_BUT_MERGER, run=STATES), MOE),
]  # fmt: skip
"""Some with a stage, or a rank's part of the optimizer, where nothing trains."""


KINDS = (
    "DP2 dense, overlapped",
    "PP2 x VPP2",
    "CP2 x PP2, documents",
    "PP2 x VPP2, merger alone trains",
)


@pytest.mark.parametrize("case", kinds(CASES + FROZEN, KINDS, lambda case: case.name))
def test_equals_serial(case: Case, pool: WorkerPool) -> None:
    case = replace(case, steps=STEPS)
    assert_equals_serial(pool, case, later_loss=LATER_LOSS_TOLERANCE)
    trained = set(PARTS) - set(case.layout.frozen)
    gradients = serial_run(pool, case).gradients
    assert {part_of(key) for key, value in gradients.items() if value.norm()} == trained


@pytest.mark.exhaustive
def test_what_trained_in_parallel_is_transformers_model(pool: WorkerPool) -> None:
    """After five steps at TP2 x PP2 x EP2, transformers has the loss that the sixth began with."""
    case = Case("trained", 4, vision(tp=2, pp=2, ep=2), PLAIN, steps=6)
    config, steps = case.config, batches(case)
    arguments = {
        "model_config": config,
        "layout": case.layout,
        "weights": initial_weights(pool, config),
    }
    trained = pool.run(train, case.world, batches=steps[:-1], **arguments)
    ours = pool.run(train, case.world, batches=steps, **arguments)[0].loss_sums[-1]
    weights = mcore_to_hf(config, assemble([result.parameters for result in trained]))
    model = vision_language_model(config)
    model.load_state_dict(weights)
    last = steps[-1]
    assert isinstance(last, VisionBatch)
    tokens, images = last.tokens[:, :-1], last.images(0, len(last.rows))
    with torch.no_grad():
        logits = model(input_ids=tokens, mm_token_type_ids=token_types(tokens), **images).logits
    expected = mean_loss(logits, last.tokens[:, 1:])
    assert float(ours[0] / ours[1]) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.exhaustive
def test_evaluation_with_images_and_without(pool: WorkerPool) -> None:
    """Without images the tower does not run then, and MTP's stage receives none."""
    case = Case("evaluated", 2, vision(pp=2), MOE, steps=1)
    config, [batch] = case.config, batches(case)
    text = VisionBatch(config, [row(config, case.length, [], [], seed=n) for n in range(2)])
    given = {"config": config, "weights": initial_weights(pool, config), "batches": [batch, text]}
    [expected] = pool.run(evaluate, 1, layout=vision(), **given)
    for losses in pool.run(evaluate, case.world, layout=case.layout, **given):
        assert losses == pytest.approx(expected, abs=TOKEN_LOSS_TOLERANCE)


def evaluate(
    config: Qwen35Config, layout: Layout, weights: dict[str, torch.Tensor], batches: list[Any]
) -> list[float]:
    """The mean loss of each batch, in a pool worker."""
    from tests.helpers.training import (
        Result,
        build_chunks,
        config_for,
        forward_backward,
        initialize,
    )

    initialize(layout)
    transformer_config = config_for(config, layout)
    chunks = build_chunks(config, transformer_config, layout)
    load_global(chunks, weights)
    for chunk in chunks:
        chunk.eval()
    sums = [
        forward_backward(batch, chunks, transformer_config, 1, Result(), 0, forward_only=True)
        for batch in batches
    ]
    return [float(loss / tokens) for loss, tokens in sums]


@pytest.mark.parametrize(
    ("layout", "model", "run", "says"),
    [
        (vision(pp=2), MOE, {"mtp_standalone": True}, "on the same stage"),
        (vision(tp=2), {"vision": {"num_heads": 1}}, {}, "num_heads"),
        (vision(ep=2), PLAIN, {"overlap_moe_expert_parallel_comm": True}, "leave the overlap off"),
        (vision(), PLAIN, {"cuda_graph_impl": "local"}, "leave CUDA graphs off"),
    ],
    ids=[
        "MTP in a stage of its own",
        "heads that TP2 does not divide",
        "overlapped experts",
        "graphs",
    ],
)
@pytest.mark.exhaustive
def test_what_the_tower_cannot_run_is_refused(
    pool: WorkerPool, layout: Layout, model: dict[str, Any], run: dict[str, Any], says: str
) -> None:
    config = vision_toy_config(**model)
    with pytest.raises(CaseError, match=says):
        pool.run(build, 2, layout=layout, config=config, run=run)


def build(layout: Layout, config: Qwen35Config, run: dict[str, Any]) -> None:
    """Build the model, in a pool worker."""
    from tests.helpers.training import build_chunks, config_for, initialize

    initialize(layout)
    transformer_config = config_for(config, layout)
    for name, value in run.items():
        setattr(transformer_config, name, value)
    build_chunks(config, transformer_config, layout)
