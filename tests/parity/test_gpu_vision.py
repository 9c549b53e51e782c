"""On a GPU: the vision-language model on Transformer Engine against float32 in plain torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from qwen35_mcore.config.model_config import Qwen35Config
from tests.helpers.one_gpu import (
    copy_weights,
    fast_model,
    local_model,
    object_keys,
    one_rank,
    relative,
)

__all__ = ["one_rank"]  # a fixture
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]

BACKENDS = [
    "fused",
    pytest.param(
        "flash",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("flash_attn") is None, reason="needs flash_attn"
        ),
    ),
]


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    """TF32 is put back as it was."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def narrow_vision(flavor: str) -> Qwen35Config:
    """Heads of the published 72 channels in the tower, and of 256 in the language model."""
    from tests.helpers.toys import narrow_config
    from tests.helpers.vision import with_tower

    return with_tower(narrow_config(flavor), hidden_size=144, num_heads=2, patch_size=16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_near_float32(backend: str) -> None:
    """The loss, and every gradient of a dense model, MTP included: Transformer Engine's layers and
    attention, and FLA, are not far from what plain torch makes of bfloat16."""
    from megatron.core.transformer.enums import AttnBackend

    model_config = narrow_vision("tiny-dense")
    exact = local_model(model_config, vision=True)
    rounded = local_model(model_config, torch.bfloat16, vision=True)
    run = {"attention_backend": AttnBackend[backend]}
    fast = fast_model(model_config, run=run, vision=True)
    for model in (rounded, fast):
        copy_weights(exact, model)
    compare(model_config, exact, rounded, fast, loss=5e-3, gradient=2e-2)


def test_transformer_engine_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its linears and norms, with attention in plain torch: none of its own takes packed sequences
    in float32. They multiply in TF32, so the reference beside it does."""
    from qwen35_mcore.mcore.imports import TESpecProvider
    from qwen35_mcore.model import build
    from qwen35_mcore.model.layers.core_attention import CoreAttention

    class Provider(TESpecProvider):
        def core_attention(self) -> type:
            return CoreAttention

    model_config = narrow_vision("tiny-dense")
    exact = local_model(model_config, vision=True)
    rounded = local_model(model_config, vision=True)
    monkeypatch.setattr(build, "get_spec_provider", lambda config: Provider())
    run = {
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "bf16": False,
        "gdn_kernel": "torch",
    }
    fast = fast_model(model_config, run=run, vision=True)
    for model in (rounded, fast):
        copy_weights(exact, model)
    compare(model_config, exact, rounded, fast, loss=1e-3, gradient=5e-3)


def test_a_mixture_of_experts_is_near_float32() -> None:
    """The loss, and the tower's gradients, which see little of the tokens that rounding routes
    otherwise; and both spec providers have the same checkpoint keys."""
    from tests.helpers.shards import local_shards

    model_config = narrow_vision("tiny-moe")
    exact = local_model(model_config, vision=True)
    rounded = local_model(model_config, torch.bfloat16, vision=True)
    fast = fast_model(model_config, vision=True)
    for model in (rounded, fast):
        copy_weights(exact, model)
    compare(model_config, exact, rounded, fast, loss=5e-3, gradient=2e-2, of="vision_model.")
    assert {s.key for s in local_shards([exact])} == {s.key for s in local_shards([fast])}
    assert object_keys(fast) <= object_keys(exact)


def compare(
    model_config: Qwen35Config,
    exact: Any,
    rounded: Any,
    fast: Any,
    *,
    loss: float,
    gradient: float,
    of: str = "",
) -> None:
    """Loss and every gradient of ``fast`` against ``exact``; where ``rounded``, the same in plain
    torch with products as coarse, is itself that far, four times its error is the bound.

    Args:
        loss, gradient: relative errors that are allowed.
        of: prefix of the parameters whose gradients count.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    exact_loss, expected = answer(model_config, exact)
    torch.backends.cuda.matmul.allow_tf32 = True
    _, coarse = answer(model_config, rounded)
    fast_loss, actual = answer(model_config, fast)
    assert fast_loss == pytest.approx(exact_loss, rel=loss)
    compared = [name for name in expected if name.startswith(of)]
    assert set(compared) == {name for name in actual if name.startswith(of)}
    wrong = {}
    for name in compared:
        error = relative(actual[name], expected[name])
        bound = max(4 * relative(coarse[name], expected[name]), gradient)
        print(f"{name:75s} {error:.2e}  bound {bound:.2e}")
        if not error <= bound:
            wrong[name] = (error, bound)
    assert not wrong


def answer(model_config: Qwen35Config, model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of two rows with images of several sizes and a video. Attention does not
    depend on the keys' biases, so what is left of their gradients is no number to compare."""
    from tests.helpers.vision import VisionBatch, row

    rows = [
        row(model_config, 256, [(1, 8, 10), (1, 4, 4)], [(2, 4, 6)], seed=1),
        row(model_config, 256, [(1, 16, 16)], [], seed=2),
    ]
    batch = VisionBatch(model_config, rows)
    images = {name: value.cuda() for name, value in batch.images(0, 2).items()}
    tokens = batch.tokens.cuda()
    loss = model(tokens[:, :-1], labels=tokens[:, 1:].contiguous(), **images).float().mean()
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad.float()
        if name.startswith("vision_model.") and name.endswith("linear_qkv.bias"):
            heads = model.vision.num_heads
            gradient = gradient.view(heads, 3, -1)[:, ::2]  # of each head: query, key, value
        gradients[name] = gradient
    return float(loss.detach()), gradients
