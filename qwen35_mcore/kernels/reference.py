"""The mathematics of a gated delta net, in plain torch: the specification the kernels answer to.

Everything here computes in float32, or in float64 when any input is float64, and is
differentiable by autograd. Inputs may be any float dtype; outputs come back in the dtype of the
first argument, states in the compute dtype.

Shape suffixes:
    b batch rows (1 when sequences are packed)      s tokens          c channels    w taps
    h key heads, or value heads where v, g or beta  k key head dim    v value head dim
    n sequences: the batch rows, or the packed sequences when ``cu_seqlens`` is given
Inside the chunked form:
    m chunks    h key heads    r value heads per key head    i, j tokens of one chunk

Sources: Gated Delta Networks, arXiv 2412.06464 (the rule: eq. 10; the chunkwise form: section
3.3); the triangular system of the delta rule: arXiv 2406.06484, section 3.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen35_mcore.kernels.chunks import Chunks, consecutive_ranges

L2NORM_EPS = 1e-6


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any tensor is float64, float32 otherwise."""
    doubles = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if doubles else torch.float32


def l2norm(x: Tensor, eps: float = L2NORM_EPS) -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last axis, in the dtype of x.

    The epsilon is added to the sum, as transformers and FLA do, not to the norm.
    """
    x_up = x.to(compute_dtype(x))
    return (x_up * torch.rsqrt(x_up.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    """``x_hat * (1 + weight)`` when zero-centred, ``x_hat * weight`` otherwise.

    The product is rounded to the dtype of x once, at the end.

    Args:
        x: [..., d].
        weight: [d], any float dtype.
    """
    dtype = compute_dtype(x)
    x_hat = _rms_normalize(x.to(dtype), eps)
    weight = weight.to(dtype)
    return (x_hat * (1.0 + weight if zero_centered else weight)).to(x.dtype)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x_hat * weight * silu(z)``, the GDN output norm: not zero-centred, norm before gate.

    x_hat is rounded to the dtype of x before it meets the weight, because transformers'
    ``Qwen3_5RMSNormGated`` does so: in bfloat16 that rounding is part of the model.

    Args:
        x, z: [..., v].
        weight: [v], float32 in this model whatever the dtype of x.
    """
    dtype = compute_dtype(x, z)
    x_hat = _rms_normalize(x.to(dtype), eps).to(x.dtype)
    return (weight * x_hat * F.silu(z.to(dtype))).to(x.dtype)


def _rms_normalize(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def decay_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:  # noqa: N803 (checkpoint name)
    """The log decay ``g = -exp(A_log) * softplus(a + dt_bias)``, in the compute dtype.

    Args:
        a: [b, s, h] raw projection.
        A_log, dt_bias: [h].
    """
    dtype = compute_dtype(a, A_log, dt_bias)
    return -A_log.to(dtype).exp() * F.softplus(a.to(dtype) + dt_bias.to(dtype))


def causal_conv1d(
    x_bsc: Tensor,
    weight_cw: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution over the token axis; the last tap is the token itself.

    Args:
        x_bsc: [b, s, c].
        weight_cw: [c, w].
        bias: [c].
        activation: "silu" or None.
        cu_seqlens: [n + 1] boundaries of packed sequences (b must be 1); no tap crosses one.

    Returns:
        [b, s, c] in the dtype of x.

    Raises:
        ValueError: an unknown activation, or boundaries that do not cover the tokens.
    """
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    dtype = compute_dtype(x_bsc, weight_cw)
    tokens, taps = x_bsc.shape[1], weight_cw.shape[1]
    age_s = _position_in_sequence(x_bsc, cu_seqlens)
    weight_wc = weight_cw.to(dtype).unbind(1)
    padded = F.pad(x_bsc.to(dtype), (0, 0, taps - 1, 0))
    y = padded[:, taps - 1 :] * weight_wc[-1]
    for lag in range(1, taps):
        start = taps - 1 - lag
        shifted = padded[:, start : start + tokens]
        if age_s is not None:
            # masked_fill, not a product: a NaN of the neighbouring sequence must not come through.
            shifted = shifted.masked_fill((age_s < lag)[None, :, None], 0.0)
        y = torch.addcmul(y, shifted, weight_wc[-1 - lag])
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if activation else y).to(x_bsc.dtype)


def _position_in_sequence(x_bsc: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    if cu_seqlens is None:
        return None
    lengths = _sequence_lengths(cu_seqlens, x_bsc.shape[0], x_bsc.shape[1])
    return torch.cat([torch.arange(n, device=x_bsc.device) for n in lengths])


def recurrent_gated_delta_rule(
    q_bshk: Tensor,
    k_bshk: Tensor,
    v_bshv: Tensor,
    g_bsh: Tensor,
    beta_bsh: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule token by token: the definition, slow and obvious.

    With the state S of shape [k, v], per token::

        S <- exp(g) S
        S <- S + k (x) beta (v - k S)
        o  = scale * q S

    Args:
        q_bshk, k_bshk: [b, s, hk, k].
        v_bshv: [b, s, hv, v]; hv is a multiple of hk, and value head j reads key head
            ``j // (hv // hk)``.
        g_bsh: [b, s, hv] log decay, at most 0.
        beta_bsh: [b, s, hv] write strength.
        scale: of q; ``k ** -0.5`` when None.
        initial_state: [n, hv, k, v]; zeros when None.
        use_qk_l2norm: normalise q and k first (`l2norm`).
        cu_seqlens: [n + 1] boundaries of packed sequences; b must be 1.

    Returns:
        o [b, s, hv, v] in the dtype of q, and the final state [n, hv, k, v] in the compute
        dtype, or None unless ``output_final_state``.

    Raises:
        ValueError: shapes that do not fit together.
    """
    case = _prepare(
        q_bshk, k_bshk, v_bshv, g_bsh, beta_bsh, scale, initial_state, use_qk_l2norm, cu_seqlens
    )
    ratio = case.v.shape[2] // case.k.shape[2]
    q_s = case.q.repeat_interleave(ratio, dim=2).unbind(1)
    k_s = case.k.repeat_interleave(ratio, dim=2).unbind(1)
    v_s, decay_s, beta_s = case.v.unbind(1), case.g.exp().unbind(1), case.beta.unbind(1)

    outputs, finals = [], []
    for state, tokens in zip(case.states, case.token_ranges(), strict=True):
        for t in tokens:
            state = state * decay_s[t][..., None, None]
            read_bhv = (k_s[t].unsqueeze(-2) @ state).squeeze(-2)
            write_bhv = beta_s[t].unsqueeze(-1) * (v_s[t] - read_bhv)
            state = state + k_s[t].unsqueeze(-1) * write_bhv.unsqueeze(-2)
            outputs.append((q_s[t].unsqueeze(-2) @ state).squeeze(-2))
        finals.append(state)
    o_bshv = torch.stack(outputs, dim=1).to(q_bshk.dtype)
    return o_bshv, torch.cat(finals) if output_final_state else None


def chunk_gated_delta_rule(
    q_bshk: Tensor,
    k_bshk: Tensor,
    v_bshv: Tensor,
    g_bsh: Tensor,
    beta_bsh: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor | None]:
    """The same function as `recurrent_gated_delta_rule`, a chunk of tokens at a time.

    With S the state that enters a chunk, D_ij the decay from token j to token i (0 for j > i)
    and d_i the decay from the chunk's start to token i, the writes U of all tokens solve::

        (I + tril(beta D * K K^T, -1)) U = beta (V - d K S)

    which is linear in S, so that everything but the product with S is done for all chunks at
    once. Arguments, results and errors are those of the recurrent form.

    Args:
        chunk_size: tokens per chunk; any value gives the same result up to rounding.
    """
    case = _prepare(
        q_bshk, k_bshk, v_bshv, g_bsh, beta_bsh, scale, initial_state, use_qk_l2norm, cu_seqlens
    )
    chunked = Chunks.of(case.run_lengths, chunk_size, case.packed, q_bshk.device)
    key_heads = case.k.shape[2]
    q = chunked.split(case.q, key_heads)
    k = chunked.split(case.k, key_heads)
    v = chunked.split(case.v, key_heads)
    g = chunked.split(case.g.unsqueeze(-1), key_heads)
    beta = chunked.split(case.beta.unsqueeze(-1), key_heads)

    decay_ij = _pairwise_decay(g.squeeze(-1))
    from_start_i = g.cumsum(-2).exp()
    to_end_i = decay_ij[..., -1, :].unsqueeze(-1)
    # unitriangular: the solver neither reads nor differentiates the diagonal and above.
    system_ij = beta * decay_ij * (k @ k.mT)
    right_hand = torch.cat([beta * v, beta * from_start_i * k], dim=-1)
    solved = torch.linalg.solve_triangular(system_ij, right_hand, upper=False, unitriangular=True)
    write_m, erase_m = (x.unbind(1) for x in solved.split([v.shape[-1], k.shape[-1]], dim=-1))
    # unbind, not indexing in the loop: the gradient of x[:, m] is as large as x, for every m.
    read_m = (from_start_i * q).unbind(1)
    attend_m = (decay_ij * (q @ k.mT)).unbind(1)
    keep_m = (to_end_i * k).mT.unbind(1)
    carry_m = from_start_i[..., -1:, :].unbind(1)

    outputs, finals = [], []
    for flat_state, chunks in zip(case.states, chunked.chunk_ranges(), strict=True):
        state = flat_state.unflatten(1, (key_heads, -1))
        for m in chunks:
            u = write_m[m] - erase_m[m] @ state
            outputs.append(read_m[m] @ state + attend_m[m] @ u)
            state = carry_m[m] * state + keep_m[m] @ u
        finals.append(state.flatten(1, 2))
    o_bshv = chunked.join(torch.stack(outputs, dim=1)).to(q_bshk.dtype)
    return o_bshv, torch.cat(finals) if output_final_state else None


def _pairwise_decay(g_bmhri: Tensor) -> Tensor:
    """``exp(g_{j+1} + ... + g_i)`` for j <= i, 0 for j > i: [b, m, h, r, i, j].

    Each sum is accumulated on its own. As a difference of two prefix sums a small decay after a
    large one would lose its digits, and the masked half would overflow.
    """
    size = g_bmhri.shape[-1]
    on_or_above = torch.ones(size, size, dtype=torch.bool, device=g_bmhri.device).triu()
    steps_ij = g_bmhri.unsqueeze(-1).expand(*g_bmhri.shape, size).masked_fill(on_or_above, 0.0)
    return steps_ij.cumsum(-2).exp().tril()


@dataclass(frozen=True)
class _Case:
    """Checked inputs in the compute dtype, q scaled, with one state per run of tokens.

    Unpacked, there is one run whose state holds all batch rows; packed, one run per sequence.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    states: tuple[Tensor, ...]
    run_lengths: list[int]
    packed: bool

    def token_ranges(self) -> list[range]:
        return consecutive_ranges(self.run_lengths)


def _prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    use_qk_l2norm: bool,
    cu_seqlens: Tensor | None,
) -> _Case:
    _check_shapes(q, k, v, g, beta)
    dtype = compute_dtype(q, k, v, g, beta, initial_state)
    batch, tokens, _, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    packed = cu_seqlens is not None
    run_lengths = [tokens] if cu_seqlens is None else _sequence_lengths(cu_seqlens, batch, tokens)
    sequences = len(run_lengths) * batch

    state_shape = (sequences, value_heads, key_dim, value_dim)
    if initial_state is None:
        initial_state = torch.zeros(state_shape, dtype=dtype, device=q.device)
    elif initial_state.shape != state_shape:
        raise ValueError(f"initial_state must be {state_shape}, got {tuple(initial_state.shape)}")

    q, k = q.to(dtype), k.to(dtype)
    if use_qk_l2norm:
        q, k = l2norm(q), l2norm(k)
    q = q * (key_dim**-0.5 if scale is None else scale)
    return _Case(
        q=q,
        k=k,
        v=v.to(dtype),
        g=g.to(dtype),
        beta=beta.to(dtype),
        states=initial_state.to(dtype).split(batch),
        run_lengths=run_lengths,
        packed=packed,
    )


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape, got {tuple(q.shape)} and {tuple(k.shape)}")
    if v.shape[:2] != q.shape[:2] or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"v must be [b, s, a multiple of {q.shape[2]} heads, v] over the tokens of q "
            f"{tuple(q.shape)}, got {tuple(v.shape)}"
        )
    for name, gate in (("g", g), ("beta", beta)):
        if gate.shape != v.shape[:3]:
            raise ValueError(f"{name} must be {tuple(v.shape[:3])}, got {tuple(gate.shape)}")
    if q.shape[1] == 0:
        raise ValueError("the sequence is empty")


def _sequence_lengths(cu_seqlens: Tensor, batch: int, tokens: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if batch != 1:
        raise ValueError(f"packed sequences need batch 1, got {batch}")
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 0:
        raise ValueError(f"cu_seqlens must rise from 0 to {tokens} tokens, got {bounds}")
    return lengths
