"""The vision-language model is transformers': positions, logits, losses, every gradient.

float32 on a CPU, both classes (dense and MoE); images of several sizes, video, several a sample,
none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from checkpoint_tools.table.names import hf_to_mcore
from qwen35_mcore.config.model_config import Qwen35Config
from tests.helpers.distributed import WorkerPool
from tests.helpers.kinds import kinds
from tests.helpers.reference_model import (
    ReferenceMTP,
    mean_loss,
    reference_weights,
    vision_language_model,
)
from tests.helpers.shards import assemble
from tests.helpers.training import Layout, train
from tests.helpers.vision import (
    Grid,
    Row,
    VisionBatch,
    row,
    row_of_documents,
    token_types,
    vision_logits,
    vision_toy_config,
)
from tests.parity.test_transformers import (
    LOGIT_TOLERANCE,
    LOSS_TOLERANCE,
    YARN,
    Gradients,
    wrong_gradients,
)


@dataclass(frozen=True)
class Case:
    name: str
    config: Qwen35Config
    length: int
    rows: list[tuple[list[Grid], list[Grid]]] = field(hash=False)
    """Images and videos of each row."""


CASES = [
    Case(
        "moe-mtp-images-and-video",
        vision_toy_config(mtp_num_hidden_layers=1),
        62,
        [([(1, 4, 6), (1, 2, 2), (1, 8, 4)], [(3, 4, 2)]), ([], [])],
    ),
    Case("dense-tied-one-image", vision_toy_config(moe=False, tie_word_embeddings=True), 40,
         [([(1, 12, 10)], [])]),
    Case("dense-video-alone", vision_toy_config(moe=False), 50, [([], [(2, 4, 4), (1, 2, 6)])] * 2),
    Case("dense-no-image", vision_toy_config(moe=False), 33, [([], [])]),
    Case("moe-yarn-tall-and-wide", vision_toy_config(rope_parameters=YARN), 60,
         [([(1, 2, 16), (1, 16, 2)], []), ([(1, 6, 6)], [(2, 2, 4)])]),
    Case("dense-mtp-image-first-patches",
         vision_toy_config(moe=False, mtp_num_hidden_layers=1, vision={"depth": 3, "num_heads": 2}),
         30, [([(1, 2, 4)], [])]),
]  # fmt: skip


def batch_of(case: Case) -> VisionBatch:
    rows = [
        row(case.config, case.length, images, videos, seed=number)
        for number, (images, videos) in enumerate(case.rows)
    ]
    return VisionBatch(case.config, rows)


@dataclass
class Comparison:
    """Both sides of one case; gradients by checkpoint key."""

    logits: tuple[torch.Tensor, torch.Tensor]
    loss: tuple[float, float]
    mtp_loss: tuple[float, float] | None
    gradients: Gradients


@pytest.fixture(
    scope="module",
    params=kinds(CASES, ["moe-mtp-images-and-video"], name=lambda case: case.name),
)
def comparison(request: pytest.FixtureRequest, pool: WorkerPool) -> Comparison:
    """Run one case on both sides, once for all the tests below."""
    case: Case = request.param
    config, batch = case.config, batch_of(case)
    model = vision_language_model(config)
    mtp = ReferenceMTP(model, config) if config.mtp_num_hidden_layers else None
    logits, loss, mtp_loss, gradients = reference(model, mtp, batch)
    exact = reference(
        copy.deepcopy(model).double(), copy.deepcopy(mtp).double() if mtp else None, batch
    )[3]
    weights = our_weights(config, model, mtp)
    [ours] = pool.run(vision_logits, 1, config=config, batch=batch, weights=weights)
    [result] = pool.run(
        train,
        1,
        model_config=config,
        layout=Layout(vision=True, run={"moe_router_load_balancing_type": "none"}),
        weights=weights,
        batches=[batch],
        micro_batch_size=len(batch.rows),
    )
    our_gradients = assemble([result.gradients])
    expected, expected_exact = (
        hf_to_mcore(config, each, vision=True) for each in (gradients, exact)
    )
    assert our_gradients.keys() == expected.keys()
    return Comparison(
        logits=(ours, logits),
        loss=(float(result.token_loss[0, 0][1].double().mean()), float(loss)),
        mtp_loss=None if mtp_loss is None else (result.logged["mtp_1 loss"], float(mtp_loss)),
        gradients={
            key: (our_gradients[key], expected[key], expected_exact[key]) for key in expected
        },
    )


def our_weights(config: Qwen35Config, model: Any, mtp: Any) -> dict[str, torch.Tensor]:
    """transformers' weights by checkpoint key."""
    named = reference_weights(model, mtp)
    return {key: value.detach() for key, value in hf_to_mcore(config, named, vision=True).items()}


def reference(model: Any, mtp: Any, batch: VisionBatch) -> Any:
    """Logits, loss, MTP's loss and all gradients (zero where there is none) of transformers."""
    dtype = next(model.parameters()).dtype
    images = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in batch.images(0, len(batch.rows)).items()
    }
    tokens = batch.tokens[:, :-1]
    seen: dict[str, torch.Tensor] = {}
    text = model.model.language_model
    hook = text.register_forward_pre_hook(
        lambda module, args, given: seen.update(embedded=given["inputs_embeds"]), with_kwargs=True
    )
    hidden = model.model(
        input_ids=tokens, mm_token_type_ids=token_types(tokens), use_cache=False, **images
    ).last_hidden_state
    hook.remove()
    logits = model.lm_head(hidden)
    total = loss = mean_loss(logits, batch.tokens[:, 1:])
    mtp_loss = None
    if mtp is not None:
        positions = hf_positions(model, batch)
        mtp_loss = mtp.loss(model, hidden, batch.tokens, seen["embedded"], positions)
        total = loss + 0.1 * mtp_loss
    named = reference_weights(model, mtp)
    values = torch.autograd.grad(total, list(named.values()), materialize_grads=True)
    return logits.detach(), loss.detach(), mtp_loss, dict(zip(named, values, strict=True))


def hf_positions(model: Any, batch: VisionBatch) -> torch.Tensor:
    """What transformers' ``get_rope_index`` says of a batch."""
    grids = {name: x for name, x in batch.images(0, len(batch.rows)).items() if "grid" in name}
    tokens = batch.tokens[:, :-1]
    positions: torch.Tensor = model.model.get_rope_index(tokens, token_types(tokens), **grids)[0]
    return positions


def test_logits(comparison: Comparison) -> None:
    ours, expected = comparison.logits
    assert (ours - expected).abs().max() <= LOGIT_TOLERANCE * expected.abs().max()


def test_losses(comparison: Comparison) -> None:
    for pair in (comparison.loss, comparison.mtp_loss):
        if pair is not None:
            assert pair[0] == pytest.approx(pair[1], abs=LOSS_TOLERANCE)


def test_gradient_of_every_parameter(comparison: Comparison) -> None:
    """The tower's without an image are zero."""
    assert wrong_gradients(comparison.gradients) == {}
    assert any(key.startswith("vision_model.") for key in comparison.gradients)


@pytest.mark.exhaustive
def test_documents_of_one_row_train_as_rows_of_their_own(pool: WorkerPool) -> None:
    """Same losses of every token, MTP's among them, and same gradients."""
    config, length = CASES[0].config, 16
    documents: list[tuple[int, list[Grid], list[Grid]]] = [
        (length, [(1, 4, 4), (1, 2, 2)], []),
        (length, [], []),
        (length, [(1, 2, 6)], [(2, 2, 2)]),
        (length, [], [(1, 4, 8)]),
    ]
    whole = row_of_documents(config, documents, seed=3)
    rows = [
        Row(tokens, images, videos)
        for tokens, (_, images, videos) in zip(
            whole.tokens.unfold(0, length + 1, length), documents, strict=True
        )
    ]
    weights = our_weights(
        config, model := vision_language_model(config), ReferenceMTP(model, config)
    )
    packed, apart = (
        pool.run(
            train,
            1,
            model_config=config,
            layout=Layout(vision=True, packed=batch.documents is not None),
            weights=weights,
            batches=[batch],
            micro_batch_size=len(batch.rows),
        )[0]
        for batch in (
            VisionBatch(config, [whole], [[length] * len(documents)]),
            VisionBatch(config, rows),
        )
    )
    losses, expected = (one.token_loss[0, 0][1].flatten() for one in (packed, apart))
    assert (losses - expected).abs().max() <= LOSS_TOLERANCE
    assert packed.logged == pytest.approx(apart.logged, abs=LOSS_TOLERANCE)
    gradients, expected_gradients = (assemble([one.gradients]) for one in (packed, apart))
    for key, value in expected_gradients.items():
        assert (gradients[key] - value).norm() <= 2e-5 * value.norm(), key
