"""On a GPU: the vision-language model on Transformer Engine against its float32 self."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.one_gpu import (
    copy_weights,
    forget_attention_backend,
    object_keys,
    one_rank,
    relative,
)

__all__ = ["one_rank"]  # a fixture
pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]


def test_model_in_bfloat16_is_near_float32() -> None:
    """Loss and the tower's gradients, with heads of the published 72 channels; and both spec
    providers have the same checkpoint keys."""
    from qwen35_mcore.model.build import build_model
    from qwen35_mcore.model.transformer_config import transformer_config
    from tests.bench.common import gpu_config
    from tests.helpers.shards import local_shards
    from tests.helpers.toys import narrow_config
    from tests.helpers.training import LOCAL
    from tests.helpers.vision import VisionBatch, row, with_tower

    model_config = with_tower(narrow_config(), hidden_size=144, num_heads=2, patch_size=16)
    forget_attention_backend()
    exact_config = transformer_config(
        model_config,
        **LOCAL,
        params_dtype=torch.float32,
        gdn_kernel="torch",
        moe_router_load_balancing_type="none",
    )
    exact = build_model(model_config, exact_config, vision=True).cuda()
    forget_attention_backend()
    fast = build_model(model_config, gpu_config(model_config), vision=True).cuda()
    copy_weights(exact, fast)
    rows = [
        row(model_config, 256, [(1, 8, 10), (1, 4, 4)], [(2, 4, 6)], seed=1),
        row(model_config, 256, [(1, 16, 16)], [], seed=2),
    ]
    batch = VisionBatch(model_config, rows)
    images = {name: value.cuda() for name, value in batch.images(0, 2).items()}
    tokens = batch.tokens.cuda()
    losses, gradients = {}, {}
    for name, model in (("exact", exact), ("fast", fast)):
        loss = model(tokens[:, :-1], labels=tokens[:, 1:].contiguous(), **images).float().mean()
        loss.backward()
        losses[name], gradients[name] = float(loss), tower_gradients(model)
    assert losses["fast"] == pytest.approx(losses["exact"], rel=5e-3)
    assert gradients["fast"].keys() == gradients["exact"].keys()
    for key, value in gradients["exact"].items():
        assert relative(gradients["fast"][key], value) < 0.1, key
    assert {s.key for s in local_shards([exact])} == {s.key for s in local_shards([fast])}
    assert object_keys(fast) <= object_keys(exact)


def tower_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Without the keys' biases, which attention does not depend on."""
    return {
        name: parameter.grad
        for name, parameter in model.vision_model.named_parameters()
        if not name.endswith("linear_qkv.bias")
    }
