"""No free flag changes what the model computes: the exported config could not say it.

Flags of the layout, of communication and of the precision are compared in tests/distributed and
tests/parity, with their gradients.
"""

from __future__ import annotations

import dataclasses

import pytest

from qwen35_mcore.errors import Qwen35Error
from qwen35_mcore.training.flags import GROUPS, TABLE, Kind, class_of
from tests.helpers.distributed import WorkerPool
from tests.helpers.equivalence import initial_weights
from tests.helpers.flag_words import actions, checking_parser, following_the_advice, words
from tests.helpers.toys import random_tokens, toy_config
from tests.helpers.training import Layout

COMPARED_ELSEWHERE = {
    flag
    for group in ("layout", "communication", "precision")
    for row in GROUPS[group]
    for flag in row.flags
}
IN_EVALUATION_TOO = {
    "moe_input_jitter_eps",
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_token_drop_policy",
    "moe_router_force_load_balancing",
    "moe_router_force_biased",
}
"""Noise and limits of training that megatron applies in evaluation as well, and random routing,
which cannot be saved."""


def functions(config, weights, tokens) -> dict[str, float | str]:  # type: ignore[no-untyped-def]
    """In a worker: how far each free flag moves the logits, or what refuses it on a CPU."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    from tests.helpers.traces import trace_forward

    fields = {f.name for f in dataclasses.fields(TransformerConfig)}
    parser = checking_parser(config, on_cpu=True)
    without = parser.parse_args([])
    base = trace_forward(config, Layout(), weights, tokens).logits
    found: dict[str, float | str] = {}
    for flag, action in actions(parser).items():
        free = flag in TABLE and class_of(flag).kind is Kind.FREE
        if not free or flag in COMPARED_ELSEWHERE or flag not in fields:
            continue
        given, error = following_the_advice(parser, words(action))
        if error:
            found[flag] = error
            continue
        args = parser.parse_args(given)
        run = {
            name: value
            for name, value in vars(args).items()
            if name in fields and value != getattr(without, name)
        }
        parallel_state.destroy_model_parallel()
        try:
            logits = trace_forward(config, Layout(run=run), weights, tokens).logits
        except (ValueError, AssertionError, Qwen35Error) as refusal:
            found[flag] = f"{type(refusal).__name__}: {refusal}"
            continue
        found[flag] = float((logits.float() - base).abs().max() / base.abs().max())
    return found


@pytest.fixture(scope="module")
def moved(pool: WorkerPool) -> dict[str, float | str]:
    config = toy_config()
    tokens = random_tokens(config, 2, 32, seed=1)[:, :-1]
    case = {"config": config, "weights": initial_weights(pool, config), "tokens": tokens}
    [found] = pool.run(functions, 1, **case)
    return found


def test_no_free_flag_moves_the_logits(moved: dict[str, float | str]) -> None:
    far = {
        flag: change
        for flag, change in moved.items()
        if isinstance(change, float) and change > 1e-6
    }
    assert far.keys() <= IN_EVALUATION_TOO, far
    assert "moe_router_force_load_balancing" in far  # the comparison can see a change


def test_most_of_them_were_compared(moved: dict[str, float | str]) -> None:
    refused = {flag: change for flag, change in moved.items() if isinstance(change, str)}
    assert len(moved) - len(refused) >= 25
