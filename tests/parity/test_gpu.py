"""On a GPU: GatedDeltaNet and experts against float64, the model against its float32 self."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qwen35_mcore.kernels import reference
from qwen35_mcore.kernels.grouped_linear import grouped_linear
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

LENGTH, BATCH = 512, 2


def gdn_in_float64(module: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and gradients of a GatedDeltaNet's formula on its own weights, in float64."""
    weights = {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    c = module.config
    normed = reference.rms_norm(
        x64, weights["in_proj.layer_norm_weight"], c.layernorm_epsilon, zero_centered=True
    )
    in_proj = weights["in_proj.weight"]
    if "gate_proj.weight" in weights:
        in_proj = torch.cat([in_proj, weights["gate_proj.weight"]])
    projected = F.linear(normed, in_proj).transpose(0, 1)
    qkv, z, b, a = projected.split(module.feat_dim_split, dim=-1)
    qkv = reference.causal_conv1d(qkv, weights["conv1d.weight"].squeeze(1))
    q, k, v = (
        t.unflatten(-1, (-1, d))
        for t, d in zip(
            qkv.split([module.qk_dim, module.qk_dim, module.v_dim], dim=-1),
            (c.linear_key_head_dim, c.linear_key_head_dim, c.linear_value_head_dim),
            strict=True,
        )
    )
    out, _ = reference.chunk_gated_delta_rule(
        q,
        k,
        v,
        reference.decay_gate(a, weights["A_log"], weights["dt_bias"]),
        b.sigmoid(),
        use_qk_l2norm=True,
    )
    norm = "gated_norm.weight" if "gated_norm.weight" in weights else "out_norm.weight"
    scale = weights[norm] if norm == "gated_norm.weight" else weights[norm] + 1
    out = reference.gated_rms_norm(out, z.unflatten(-1, (-1, out.shape[-1])), scale, 1e-6)
    y = F.linear(out.flatten(2).transpose(0, 1), weights["out_proj.weight"])
    y.backward(torch.ones_like(y).cumsum(0) / y.shape[0])
    return {"output": y.detach(), "x": x64.grad} | {n: w.grad for n, w in weights.items()}


def gdn_in_bfloat16(module: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    y, _ = module(x, attention_mask=None)
    y.backward((torch.ones_like(y, dtype=torch.float64).cumsum(0) / y.shape[0]).to(y.dtype))
    gradients = {n: p.grad for n, p in module.named_parameters()}
    return {"output": y.detach(), "x": x.grad} | gradients


def test_gdn_is_no_further_from_float64_than_the_native_module() -> None:
    from tests.bench.bench_gdn import build_native, build_ours, copy_weights
    from tests.bench.common import cut_config, gpu_config

    config = gpu_config(cut_config("35b-a3b", 1))
    native, ours = build_native(config), build_ours(config)
    with torch.no_grad():
        for module in (native, ours):
            module.A_log.uniform_(0, 2)
    copy_weights(native, ours)
    x = torch.randn(LENGTH, BATCH, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    exact = gdn_in_float64(ours, x)
    exact["out_norm.weight"] = exact["gated_norm.weight"]
    ours_error = {k: relative(v, exact[k]) for k, v in gdn_in_bfloat16(ours, x).items()}
    native_error = {k: relative(v, exact[k]) for k, v in gdn_in_bfloat16(native, x).items()}
    ours_error["out_norm.weight"] = ours_error.pop("gated_norm.weight")
    for name, error in ours_error.items():
        print(f"{name:30s} ours {error:.2e}  native {native_error[name]:.2e}")
    worse = {
        name: (error, native_error[name])
        for name, error in ours_error.items()
        if not error <= 1.1 * native_error[name]  # the same within the noise of a rounding
    }
    assert not worse


@pytest.mark.parametrize("gates_in_kernel", [True, False])
def test_flas_gate_at_its_extremes(gates_in_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and every gradient against float64, head by head: ``a + dt_bias`` from -60 to 60,
    rates from 1e-3 to 60. Where bfloat16's own rounding leaves more, that is the bound.

    A_log and dt_bias are compared over all heads: their gradients multiply FLA's rounding of the
    decay's gradient by the decay itself, up to 3,600 here, and where a head forgets at once nothing
    else is left (d_A_log at rate 60: 1.1e-2, beside 5.4 at rate 0.02; error 5e-3 in both)."""
    monkeypatch.setenv("FLA_FLASH_QLA", "0")  # it would compile for minutes
    from qwen35_mcore.kernels.fla_kernels import FlaKernels
    from qwen35_mcore.kernels.torch_kernels import TorchKernels
    from tests.parity.test_gated_delta_rule import (
        exact_rule,
        extreme_gates,
        of_each_head,
        run_layer_rule,
    )

    def by_head(results: dict[str, Any]) -> dict[str, torch.Tensor]:
        parameters = ("d_A_log", "d_dt_bias")
        heads = of_each_head(results)
        apart = {n: x for n, x in heads.items() if not n.startswith(parameters)}
        return apart | {name: results[name] for name in parameters}

    case = extreme_gates(256, 64, "cuda")
    d_o = torch.randn(
        1, 256, 4, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(1)
    )
    exact = by_head(exact_rule(case, d_o))
    rounded = by_head(run_layer_rule(TorchKernels("rounded"), case, None, d_o, None))
    fla = FlaKernels("tested", gates_in_kernel=gates_in_kernel)
    actual = by_head(run_layer_rule(fla, case, None, d_o, None))
    for name, expected in exact.items():
        assert actual[name].isfinite().all(), name
        if expected.norm() > 1e-6:  # what is not lost in bfloat16
            bound = max(8 * relative(rounded[name], expected), 2e-2)
            assert relative(actual[name], expected) <= bound, name


def test_packed_sequences_equal_separate_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of a GatedDeltaNet whose sequences follow one another in one batch."""
    monkeypatch.setenv("FLA_FLASH_QLA", "0")  # it would compile for minutes
    torch.manual_seed(5)
    from megatron.core.packed_seq_params import PackedSeqParams

    from tests.bench.bench_gdn import build_ours
    from tests.bench.common import cut_config, gpu_config

    lengths = [200, 56, 256]
    module = build_ours(gpu_config(cut_config("35b-a3b", 1)))
    x = torch.randn(sum(lengths), 1, module.config.hidden_size, device="cuda").bfloat16()
    gradient = torch.randn_like(x)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )

    def both(pieces: list[torch.Tensor], **call: Any) -> dict[str, torch.Tensor]:
        module.zero_grad()
        leaves = [piece.detach().requires_grad_() for piece in pieces]
        outputs = [module(leaf, attention_mask=None, **call)[0] for leaf in leaves]
        torch.cat(outputs).backward(gradient)
        found = {"output": torch.cat(outputs), "x": torch.cat([leaf.grad for leaf in leaves])}
        weights = {name: weight.grad for name, weight in module.named_parameters()}
        return {name: value.detach().clone() for name, value in (found | weights).items()}

    together = both([x], packed_seq_params=packed)
    for name, separate in both(list(x.split(lengths))).items():
        assert relative(together[name], separate) < 1e-2, name


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_the_gates_of_an_fp8_run_are_as_good_as_bfloat16(recipe: str) -> None:
    """Logits and gradients of the gate projection under FP8: at most twice bf16's error.

    The same product in FP8 is the contrast: it is why the projection stands apart.
    """
    from megatron.core.fp8_utils import get_fp8_context

    from tests.bench.bench_gdn import build_ours
    from tests.bench.common import cut_config, gpu_config

    model_config = cut_config("35b-a3b", 1)
    heads = model_config.linear_num_value_heads
    torch.manual_seed(0)
    x = torch.randn(LENGTH, BATCH, model_config.hidden_size, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(LENGTH, BATCH, 2 * heads, device="cuda", dtype=torch.bfloat16)

    def error(fp8: str | None, apart: bool) -> dict[str, float]:
        config = gpu_config(model_config, fp8, gdn_gates_apart=apart)
        module, inputs = build_ours(config), x.detach().requires_grad_()
        with get_fp8_context(config):
            if apart:
                weight = module.gate_proj.weight
                logits = torch.cat(module.gate_proj(inputs, module.in_proj.layer_norm_weight), -1)
            else:
                weight = module.in_proj.weight
                logits = module.in_proj(inputs)[0][..., -2 * heads :]
            logits.backward(grad)
        rows = weight.detach()[-2 * heads :].double().requires_grad_()
        x64 = x.double().requires_grad_()
        norm = module.in_proj.layer_norm_weight.detach().double()
        normed = reference.rms_norm(x64, norm, config.layernorm_epsilon, zero_centered=True)
        exact = F.linear(normed, rows)
        exact.backward(grad.double())
        return {
            "logits": relative(logits.detach(), exact.detach()),
            "weight": relative(weight.grad[-2 * heads :], rows.grad),
            "input": relative(inputs.grad, x64.grad),
        }

    bf16, apart, inside = error(None, False), error(recipe, True), error(recipe, False)
    for name, value in bf16.items():
        print(f"{name:8s} bf16 {value:.2e}  {recipe} {inside[name]:.2e}  apart {apart[name]:.2e}")
    assert all(apart[name] <= 2 * value for name, value in bf16.items())
    assert inside["weight"] > 2 * bf16["weight"]


@pytest.mark.parametrize("counts", [(64, 0, 1, 447), (128,) * 4, (0, 0, 512, 0)], ids=str)
def test_grouped_linear_equals_the_loop(counts: tuple[int, ...]) -> None:
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(512, 256, device="cuda", generator=generator)
    w = torch.randn(4, 384, 256, device="cuda", generator=generator) / 16
    grad = torch.randn(512, 384, device="cuda", generator=generator)
    fast, exact = [], []
    for dtype, results in ((torch.bfloat16, fast), (torch.float64, exact)):
        xd = x.bfloat16().to(dtype).requires_grad_()
        wd = w.bfloat16().to(dtype).requires_grad_()
        ends = torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)
        y = grouped_linear(xd, wd, ends)
        y.backward(grad.bfloat16().to(dtype))
        results += [y.detach(), xd.grad, wd.grad]
    for a, b in zip(fast, exact, strict=True):
        assert a.isfinite().all()
        assert relative(a, b) < 5e-3


def test_model_in_bfloat16_is_near_float32() -> None:
    """Loss of a toy model on Transformer Engine and FLA against the local backend in float32."""
    from tests.helpers.shards import local_shards
    from tests.helpers.toys import narrow_config, random_tokens

    model_config = narrow_config()
    exact, fast = local_model(model_config), fast_model(model_config)
    copy_weights(exact, fast)
    tokens = random_tokens(model_config, 2, 256, seed=3).cuda()
    positions = torch.arange(256, device="cuda").expand(2, -1)
    losses = {}
    for name, model in (("exact", exact), ("fast", fast)):
        loss = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())
        loss.float().mean().backward()
        losses[name] = float(loss.float().mean())
    print(losses)
    assert losses["fast"] == pytest.approx(losses["exact"], rel=5e-3)
    exact_keys = {s.key for s in local_shards([exact])}
    assert exact_keys == {s.key for s in local_shards([fast])}
    assert object_keys(fast) <= object_keys(exact)
