"""Context-parallel ranks that pass states of the GatedDeltaNet compute what one rank computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.kernels.base import DeltaRuleInputs
from qwen35_mcore.kernels.state_passing import Zigzag
from qwen35_mcore.kernels.torch_kernels import TorchKernels
from qwen35_mcore.model.transformer_config import transformer_config
from tests.helpers.distributed import WorkerPool
from tests.helpers.toys import toy_config
from tests.helpers.training import LOCAL, Layout, build_chunks, config_for, initialize

BATCH, TOKENS, KEY_HEADS, HEADS, KEY, VALUE, TAPS = 2, 48, 2, 4, 3, 5, 4
CHANNELS = 2 * KEY_HEADS * KEY + HEADS * VALUE
NAMES = ("x", "a", "b", "A_log", "dt_bias", "conv")


def inputs(seed: int) -> dict[str, Tensor]:
    """A layer's convolution and delta rule in float64; decay from almost none to almost all."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(BATCH, TOKENS, CHANNELS),
        "a": 3 * normal(BATCH, TOKENS, HEADS),
        "b": normal(BATCH, TOKENS, HEADS),
        "A_log": torch.linspace(-5, 2, HEADS, dtype=torch.float64),
        "dt_bias": normal(HEADS),
        "conv": normal(CHANNELS, TAPS),
        "weight": normal(BATCH, TOKENS, HEADS, VALUE),
    }


def outputs_and_gradients(case: dict[str, Tensor], context: Zigzag | None) -> dict[str, Tensor]:
    leaves = {name: case[name].clone().requires_grad_() for name in NAMES}
    kernels = TorchKernels("tested")
    mixed = kernels.causal_conv1d(leaves["x"], leaves["conv"], cp_context=context)
    q, k, v = mixed.split([KEY_HEADS * KEY, KEY_HEADS * KEY, HEADS * VALUE], dim=-1)
    out, _ = kernels.gated_delta_rule(
        DeltaRuleInputs(
            q_bshk=q.unflatten(-1, (KEY_HEADS, KEY)),
            k_bshk=k.unflatten(-1, (KEY_HEADS, KEY)),
            v_bshv=v.unflatten(-1, (HEADS, VALUE)),
            a_bsh=leaves["a"],
            b_bsh=leaves["b"],
            A_log=leaves["A_log"],
            dt_bias=leaves["dt_bias"],
            cp_context=context,
        )
    )
    (out * case["weight"]).sum().backward()
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def zigzag(x: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's two parts of ``[b, s, ...]``."""
    parts = x.chunk(2 * ranks, dim=1)
    return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]], dim=1)


def one_rank(given: dict[str, Tensor]) -> dict[str, Tensor]:
    group = torch.distributed.group.WORLD
    rank, ranks = group.rank(), group.size()
    tokens = {name: zigzag(given[name], rank, ranks) for name in ("x", "a", "b", "weight")}
    return outputs_and_gradients(given | tokens, Zigzag(group))


@pytest.mark.parametrize("ranks", [2, 4])
def test_outputs_and_gradients(pool: WorkerPool, ranks: int) -> None:
    case = inputs(seed=ranks)
    whole = outputs_and_gradients(case, None)
    found = pool.run(one_rank, ranks, given=case)
    for name, exact in whole.items():
        if exact.dim() > 2:  # has tokens
            for rank in range(ranks):
                expected = zigzag(exact, rank, ranks)
                torch.testing.assert_close(found[rank][name], expected, rtol=1e-9, atol=1e-9)
        else:
            total = torch.stack([one[name] for one in found]).sum(0)
            torch.testing.assert_close(total, exact, rtol=1e-9, atol=1e-9)


def short_parts() -> str:
    group = torch.distributed.group.WORLD
    x, weight = torch.randn(1, 4, 3), torch.randn(3, TAPS)
    with pytest.raises(ValueError, match="looks back") as error:
        TorchKernels("tested").causal_conv1d(x, weight, cp_context=Zigzag(group))
    return str(error.value)


def test_a_part_shorter_than_the_convolution_is_refused(pool: WorkerPool) -> None:
    [message, _] = pool.run(short_parts, 2)
    assert message == (
        "a part of 2 tokens is shorter than the 3 that a convolution of 4 taps looks back"
    )


def packed_sequences() -> str:
    from megatron.core.packed_seq_params import PackedSeqParams

    layout = Layout(cp=2, run={"gdn_context_parallel": "state_passing"})
    initialize(layout)
    model_config = toy_config(moe=False)
    [model] = build_chunks(model_config, config_for(model_config, layout), layout)
    bounds = torch.tensor([0, 32, 64], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=32,
        max_seqlen_kv=32,
    )
    gdn = model.decoder.layers[0].self_attention
    with pytest.raises(ConfigError) as error:
        gdn(torch.randn(32, 1, model_config.hidden_size), packed_seq_params=packed)
    return str(error.value)


def test_packed_sequences_are_refused(pool: WorkerPool) -> None:
    [message, _] = pool.run(packed_sequences, 2)
    assert message.startswith("packed sequences cannot pass states")
    assert "--gdn-context-parallel all_to_all" in message


def test_only_the_all_to_all_needs_a_key_head_for_every_rank() -> None:
    model_config = toy_config(linear_num_key_heads=2, linear_num_value_heads=4)
    run = LOCAL | {"params_dtype": torch.float32}
    passing = run | {"gdn_context_parallel": "state_passing"}
    config = transformer_config(model_config, **passing, context_parallel_size=4)
    assert config.experimental_attention_variant == "gated_delta_net"
    assert (config.linear_num_key_heads, config.linear_num_value_heads) == (2, 4)
    with pytest.raises(AssertionError, match="linear_num_key_heads"):
        transformer_config(model_config, **run, context_parallel_size=4)
    tp4 = {"tensor_model_parallel_size": 4, "sequence_parallel": True}
    with pytest.raises(AssertionError, match="linear_num_key_heads"):
        transformer_config(model_config, **passing, **tp4, context_parallel_size=2)
    with pytest.raises(ConfigError, match="all_to_all or state_passing"):
        transformer_config(model_config, **run, gdn_context_parallel="state-passing")
