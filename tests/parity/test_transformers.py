"""The model is transformers': logits, losses, routing and the gradient of every parameter.

Qwen3.5 and Qwen3-Next, float32 on a CPU. The configurations are drawn to be awkward; see the ids.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from checkpoint_tools.table.names import hf_to_mcore
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.rope import RopeParameters, YarnScaling
from tests.helpers.batches import Batch
from tests.helpers.distributed import WorkerPool
from tests.helpers.kinds import kinds
from tests.helpers.reference_model import (
    ReferenceMTP,
    reference_loss,
    reference_model,
    reference_weights,
)
from tests.helpers.shards import assemble
from tests.helpers.toys import NEXT, random_tokens, toy_config
from tests.helpers.traces import Trace, trace_forward
from tests.helpers.training import Layout, train

LOGIT_TOLERANCE = 5e-6  # of the largest logit
LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 2e-5  # relative norm


@dataclass(frozen=True)
class Case:
    name: str
    config: Qwen35Config
    batch: int
    length: int
    decoder: str = "gpt"


GDN, ATTENTION = "linear_attention", "full_attention"
YARN = RopeParameters(
    rope_theta=10000.0,
    mrope_section=(2, 1, 1),
    yarn=YarnScaling(factor=3.0, original_max_position_embeddings=64),
)

CASES = [
    Case("moe-ratio2", toy_config(), 1, 100),
    Case(
        "moe-ratio1-one-kv-head", toy_config(linear_num_value_heads=4, num_key_value_heads=1), 3, 67
    ),
    Case(
        "dense-ratio3-tied",
        toy_config(moe=False, linear_num_value_heads=12, tie_word_embeddings=True),
        1,
        130,
    ),
    Case("moe-ratio4-mtp", toy_config(linear_num_value_heads=16, mtp_num_hidden_layers=1), 3, 77),
    Case(
        "next-ratio2-mtp-top5",
        toy_config(**NEXT, num_experts=16, num_experts_per_tok=5, mtp_num_hidden_layers=1),
        2,
        70,
    ),
    Case(
        "dense-mtp-tied",
        toy_config(moe=False, tie_word_embeddings=True, mtp_num_hidden_layers=1),
        1,
        65,
    ),
    Case("moe-yarn", toy_config(rope_parameters=YARN), 1, 190),
    Case(
        "dense-non-periodic",
        toy_config(
            moe=False, num_hidden_layers=5, layer_types=(ATTENTION, GDN, GDN, ATTENTION, GDN)
        ),
        3,
        33,
    ),
    Case(
        "moe-non-periodic-mtp",
        toy_config(num_hidden_layers=3, layer_types=(GDN, ATTENTION, GDN), mtp_num_hidden_layers=1),
        1,
        50,
    ),
    Case(
        "moe-all-gdn",
        toy_config(num_hidden_layers=2, layer_types=(GDN, GDN), num_experts_per_tok=3),
        3,
        1,
    ),
    Case(
        "moe-all-attention-top4",
        toy_config(num_hidden_layers=2, layer_types=(ATTENTION,) * 2, num_experts_per_tok=4),
        1,
        90,
    ),
    Case(
        "dense-full-rotary",
        toy_config(
            moe=False,
            rope_parameters=RopeParameters(
                rope_theta=1e6, partial_rotary_factor=1.0, mrope_section=(6, 5, 5)
            ),
        ),
        1,
        72,
    ),
]


HYBRID = [replace(case, name=f"{case.name}-hybrid", decoder="hybrid") for case in CASES]

HYBRID_KINDS = (
    "moe-ratio4-mtp-hybrid",
    "next-ratio2-mtp-top5-hybrid",
    "dense-mtp-tied-hybrid",
    "moe-non-periodic-mtp-hybrid",
)
"""A third of them."""

Gradients = dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""By checkpoint key: ours, transformers' in float32, transformers' in float64."""


@dataclass
class Comparison:
    """Both sides of one case; gradients by checkpoint key."""

    reference: Trace
    ours: Trace
    loss: tuple[float, float]
    mtp_loss: tuple[float, float] | None
    gradients: Gradients


@dataclass
class Reference:
    """transformers' side; weights and gradients by checkpoint key."""

    tokens: torch.Tensor
    weights: dict[str, torch.Tensor]
    trace: Trace
    loss: float
    mtp_loss: float | None
    gradients: dict[str, torch.Tensor]
    exact: dict[str, torch.Tensor]  # gradients in float64


@pytest.fixture(
    scope="module",
    params=kinds(
        CASES + HYBRID,
        [*(case.name for case in CASES), *HYBRID_KINDS],
        lambda case: case.name,
    ),
)
def comparison(request: pytest.FixtureRequest, pool: WorkerPool) -> Comparison:
    """Run one case on both sides, once for all the tests below."""
    case: Case = request.param
    reference = reference_of(case.config, case.batch, case.length)
    [ours] = pool.run(
        trace_forward,
        1,
        config=case.config,
        layout=Layout(decoder=case.decoder),
        weights=reference.weights,
        tokens=reference.tokens[:, :-1],
    )
    [result] = pool.run(
        train,
        1,
        model_config=case.config,
        layout=Layout(
            decoder=case.decoder,
            run={"moe_router_load_balancing_type": "none"},  # the reference has none
        ),
        weights=reference.weights,
        batches=[Batch(reference.tokens)],
        micro_batch_size=case.batch,
    )
    our_gradients = assemble([result.gradients])
    assert our_gradients.keys() == reference.gradients.keys()
    loss = float(result.token_loss[0, 0][1].double().mean())
    mtp_loss = reference.mtp_loss
    return Comparison(
        reference=reference.trace,
        ours=ours,
        loss=(loss, reference.loss),
        mtp_loss=None if mtp_loss is None else (result.logged["mtp_1 loss"], mtp_loss),
        gradients={
            key: (our_gradients[key], expected, reference.exact[key])
            for key, expected in reference.gradients.items()
        },
    )


@functools.cache
def reference_of(config: Qwen35Config, batch: int, length: int) -> Reference:
    """The same for both decoders."""
    model = reference_model(config)
    mtp = ReferenceMTP(model, config) if config.mtp_num_hidden_layers else None
    tokens = random_tokens(config, batch, length, seed=11)
    loss, mtp_loss, gradients = _reference_gradients(model, mtp, tokens)
    exact = _reference_gradients(
        copy.deepcopy(model).double(), copy.deepcopy(mtp).double() if mtp else None, tokens
    )[2]
    weights = hf_to_mcore(config, reference_weights(model, mtp))
    return Reference(
        tokens,
        {key: value.detach() for key, value in weights.items()},
        Trace.of_reference(model, tokens[:, :-1]),
        float(loss),
        None if mtp_loss is None else float(mtp_loss),
        hf_to_mcore(config, gradients),
        hf_to_mcore(config, exact),
    )


def _reference_gradients(model: Any, mtp: Any, tokens: torch.Tensor) -> Any:
    named = reference_weights(model, mtp)
    loss, mtp_loss, total = reference_loss(model, mtp, tokens)
    values = torch.autograd.grad(total, list(named.values()))
    return loss.detach(), mtp_loss, dict(zip(named, values, strict=True))


def relative(difference: torch.Tensor, base: torch.Tensor) -> float:
    return float(difference.double().norm() / base.double().norm().clamp(min=1e-30))


def test_logits(comparison: Comparison) -> None:
    ours, reference = comparison.ours.logits, comparison.reference.logits
    assert (ours - reference).abs().max() <= LOGIT_TOLERANCE * reference.abs().max()


def test_loss(comparison: Comparison) -> None:
    ours, reference = comparison.loss
    assert ours == pytest.approx(reference, abs=LOSS_TOLERANCE)


def test_mtp_loss(comparison: Comparison) -> None:
    if comparison.mtp_loss is None:
        assert not any(key.startswith("mtp.") for key in comparison.gradients)
        return
    ours, reference = comparison.mtp_loss
    assert ours == pytest.approx(reference, abs=LOSS_TOLERANCE)


def test_gradient_of_every_parameter(comparison: Comparison) -> None:
    assert wrong_gradients(comparison.gradients) == {}


def wrong_gradients(gradients: Gradients) -> dict[str, str]:
    """Those beyond 2e-5, and beyond twice transformers' own float32 error where it is larger."""
    wrong = {}
    for key, (ours, reference, exact) in gradients.items():
        error = relative(ours - reference, reference)
        allowed = max(GRADIENT_TOLERANCE, 2 * relative(reference - exact, exact))
        if not error <= allowed:
            wrong[key] = f"{error:.1e} > {allowed:.1e}"
    return wrong


def test_router_probabilities(comparison: Comparison) -> None:
    """Same experts for every token, same weights; none in a dense model."""
    assert len(comparison.ours.router) == len(comparison.reference.router)
    for ours, reference in zip(comparison.ours.router, comparison.reference.router, strict=True):
        assert torch.equal(ours > 0, reference > 0)
        assert (ours - reference).abs().max() <= LOGIT_TOLERANCE


def test_gated_shared_expert(comparison: Comparison) -> None:
    assert len(comparison.ours.shared) == len(comparison.reference.shared)
    for ours, reference in zip(comparison.ours.shared, comparison.reference.shared, strict=True):
        assert (ours - reference).abs().max() <= LOGIT_TOLERANCE * reference.abs().max()


def test_text_positions_of_interleaved_mrope_are_plain_rope() -> None:
    """Transformers rotates by three equal positions; without sections the numbers are the same."""
    config = toy_config(moe=False)
    plain = replace(config, rope_parameters=RopeParameters(rope_theta=10000.0))
    tokens = random_tokens(config, 1, 40, seed=3)
    sectioned = Trace.of_reference(reference_model(config), tokens)
    assert torch.equal(sectioned.logits, Trace.of_reference(reference_model(plain), tokens).logits)
