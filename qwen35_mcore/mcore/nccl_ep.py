"""NCCL EP as Transformer Engine offers it: the exchange of a MoE layer, without the host.

Rows arrive sorted by expert in a buffer of fixed size; how many they are stays on the device.
megatron-core 0.19 has a manager for it that cannot start it with Transformer Engine 2.20 (it leaves
out the number of choices of a token), and Transformer Engine's own autograd functions fail under
torch 2.11 (two of its operators leave out an argument that they may write). Both call what is
called here.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qwen35_mcore.errors import ConfigError

OLDEST_NCCL = (2, 30, 4)
OLDEST_CAPABILITY = (9, 0)
ROWS_IN_PLACE = "NCCL_EP_HT_EM_PULL_PUSH"
"""Variable of NCCL EP: a rank reads its rows from their ranks to where its experts want them, and
adds them up where they lie, instead of copying them in between. Within one host. Between two ranks
it was compared, and takes 0.53 ms a layer instead of 0.74 (tests/bench/NOTES.md)."""
RANKS_IN_PLACE, SMS_IN_PLACE = 2, 64
"""It gains from more of the GPU's processors than the 32 that NCCL EP takes of an H200's 132; its
other way does not."""
TOKENS_PER_CHUNK = 64
"""NCCL EP counts the tokens of a rank in these."""


def unavailable() -> str | None:
    """Why NCCL EP cannot be had in this process, or None where it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    try:
        from transformer_engine.pytorch import ep  # noqa: F401
    except (ImportError, OSError) as error:
        return f"this Transformer Engine has no transformer_engine.pytorch.ep ({error})"
    import transformer_engine_torch

    if not hasattr(transformer_engine_torch, "ep_prepare_and_dispatch"):
        return "this Transformer Engine was built without NCCL EP (NVTE_BUILD_WITH_NCCL_EP=1)"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        return f"it needs a GPU of compute capability 9.0, and this one has {_dotted(capability)}"
    found = _nccl_version()
    if found is None or found < OLDEST_NCCL:
        oldest, got = _dotted(OLDEST_NCCL), _dotted(found or ("unknown",))
        return f"it needs NCCL {oldest} or later, and this process has {got}"
    return None


def _dotted(version: tuple[int | str, ...]) -> str:
    return ".".join(map(str, version))


def _nccl_version() -> tuple[int, int, int] | None:
    """Of the library that this process uses, which need not be the one torch was built with."""
    number = ctypes.c_int(0)
    try:
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return number.value // 10000, number.value // 100 % 100, number.value % 100


@dataclass(frozen=True)
class ExchangeSize:
    """What an exchange is made for; the same on all of its ranks, and for all layers of a process.

    Args:
        num_experts: of all ranks.
        ranks: that share them.
        top_k: choices of a token.
        hidden_size: width of a row.
        tokens: most that a rank sends from.
        capacity_factor: rows of a rank's receive buffer, over those it gets where routing is even.
        dtype: of the rows.
    """

    num_experts: int
    ranks: int
    top_k: int
    hidden_size: int
    tokens: int
    capacity_factor: float
    dtype: torch.dtype = torch.bfloat16

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.ranks

    @property
    def rounded_tokens(self) -> int:
        return -(-self.tokens // TOKENS_PER_CHUNK) * TOKENS_PER_CHUNK

    @property
    def capacity(self) -> int:
        """Rows of the receive buffer: never more than can arrive."""
        most = self.ranks * min(self.top_k, self.local_experts)
        return int(self.rounded_tokens * min(self.top_k * self.capacity_factor, most))


def _rows_in_place(ranks: int) -> bool:
    """Whether rows move in place: what the variable says, else where that was compared."""
    on_one_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) % ranks == 0
    if ranks <= RANKS_IN_PLACE and on_one_host:
        os.environ.setdefault(ROWS_IN_PLACE, "1")
    return os.environ.get(ROWS_IN_PLACE) == "1"


class NcclEp:
    """The exchange among the ranks of one group; one a process.

    Every method reads and writes device tensors, starts its kernels on the current stream, and may
    be captured in a CUDA graph. The handle of a dispatch belongs to its combine and to the backward
    passes of both; ``tokens_per_expert`` (int64, rows of each local expert in the buffer) and
    ``total_recv_tokens`` (int64 ``[1]``, rows that were sent here, more than the buffer holds where
    some were dropped) are its tensors.
    """

    def __init__(self, group: Any, size: ExchangeSize, max_sms: int = 0) -> None:
        """Bind the group's communicator; all of its ranks call this together.

        Args:
            max_sms: of the GPU's processors for the exchange; 0: as many as measured best.
        """
        from transformer_engine.pytorch import ep

        self.size = size
        measured_best = SMS_IN_PLACE if _rows_in_place(size.ranks) else 0
        ep.ep_bootstrap(
            group,
            size.num_experts,
            size.rounded_tokens,
            size.hidden_size,
            size.top_k,
            recv_capacity_per_rank=size.capacity,
            max_num_sms=max_sms or measured_best,
            max_token_dtype=size.dtype,
            drop_on_overflow=True,  # else the device traps, and the process dies without a word
        )

    def handle(self) -> Any:
        from transformer_engine.pytorch import ep

        size = self.size
        return ep.EpBuffer(
            size.top_k,
            size.rounded_tokens,
            size.hidden_size,
            size.local_experts,
            recv_capacity_per_rank=size.capacity,
        )

    def dispatch(
        self, handle: Any, x_th: Tensor, probs_tk: Tensor, experts_tk: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Send each token to its experts' ranks.

        Args:
            x_th: ``[tokens, hidden]``, of the size's dtype.
            probs_tk: float32 ``[tokens, top_k]``.
            experts_tk: int64 ``[tokens, top_k]``, global numbers.

        Returns:
            Rows ``[capacity, hidden]`` and the probability of each, ``[capacity]`` float32; those
            after the last expert's are unwritten.
        """
        import transformer_engine_torch as te

        rows = x_th.new_empty(self.size.capacity, x_th.shape[1])
        probs = probs_tk.new_empty(self.size.capacity)
        te.ep_prepare_and_dispatch(
            handle.handle_mem, experts_tk, x_th, probs_tk,
            handle.tokens_per_expert, handle.total_recv_tokens,
            handle.top_k, handle.alignment, rows, probs, None, None,
        )  # fmt: skip
        return rows, probs

    def dispatch_backward(
        self, handle: Any, drows: Tensor, dprobs: Tensor, tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the tokens (summed over their rows) and of their probabilities."""
        import transformer_engine_torch as te

        dx = drows.new_empty(tokens, drows.shape[1])
        dprobs_tk = dprobs.new_empty(tokens, self.size.top_k)
        te.ep_dispatch_bwd(handle.handle_mem, drows, dprobs, dx, dprobs_tk)
        return dx, dprobs_tk

    def combine(self, handle: Any, rows: Tensor, tokens: int) -> Tensor:
        """``[tokens, hidden]``: the sum of each token's rows, which come back from their ranks."""
        import transformer_engine_torch as te

        y = rows.new_empty(tokens, rows.shape[1])
        te.ep_combine(handle.handle_mem, rows, y)
        return y

    def combine_backward(self, handle: Any, dy: Tensor) -> Tensor:
        """Gradient of the rows, ``[capacity, hidden]``; unwritten after the last expert's."""
        import transformer_engine_torch as te

        drows = dy.new_empty(self.size.capacity, dy.shape[1])
        te.ep_combine_bwd(handle.handle_mem, dy, drows, None, None)
        return drows


class Fill:
    """Most rows that any layer sent to this rank since the last look, on the device.

    A plain attribute of the process: the check behind a step reads it for all layers at once.
    """

    def __init__(self) -> None:
        self.capacity = 0
        self._rows: Tensor | None = None

    def record(self, rows: Tensor, capacity: int) -> None:
        """Args: rows: int64 ``[1]``, of one dispatch."""
        self.capacity = capacity
        if self._rows is None:
            self._rows = torch.zeros_like(rows)
        torch.maximum(self._rows, rows, out=self._rows)

    def take(self) -> tuple[int, int]:
        """The most rows on any rank of the job, and the capacity; starts anew. Waits for the
        device; every rank of the job calls it together, also one without a layer of experts."""
        device = torch.cuda.current_device()
        seen = torch.tensor([0, self.capacity], dtype=torch.int64, device=device)
        if self._rows is not None:
            seen[:1] = self._rows
            self._rows.zero_()
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
        rows, capacity = seen.tolist()
        return rows, capacity


FILL = Fill()
_shared: NcclEp | None = None


def shared_exchange(group: Any, size: ExchangeSize, max_sms: int = 0) -> NcclEp:
    """The process's exchange, made at the first call.

    Raises:
        ConfigError: it was made for fewer tokens, or for other experts.
    """
    global _shared
    if _shared is None:
        _shared = NcclEp(group, size, max_sms)
    made = _shared.size
    if size != made and (size.tokens > made.tokens or _without_tokens(size, made)):
        raise ConfigError(
            "NCCL EP is made once a process, for as many tokens as the first microbatch has",
            got=f"{size}, made for {made}",
            fix="give evaluation the microbatch of training (drop --eval-micro-batch-size), or "
            "pass --moe-token-dispatcher-type alltoall",
        )
    return _shared


def _without_tokens(a: ExchangeSize, b: ExchangeSize) -> bool:
    return {**vars(a), "tokens": 0} != {**vars(b), "tokens": 0}
