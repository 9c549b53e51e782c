"""GatedDeltaNet: megatron-core's parameters, sharding and checkpoint, with a forward of our own.

One projection gives q, k, v, the output gate z and, per value head, the decay and write-strength
logits a and b. A short causal convolution runs over q, k and v; the gated delta rule (Yang et al.,
"Gated Delta Networks", arXiv 2412.06464) mixes along the sequence; the result is normalised, gated
by silu(z) and projected back.

What differs from megatron-core's module: q and k keep their own head count (grouped value heads)
and the l2 norm, decay gate and sigmoid run inside the kernel; A_log, dt_bias and the output norm
stay float32; under FP8 the logits a and b keep a projection in the parameters' dtype; the output
norm is Hugging Face's (not zero-centred) under a key of its own, so that a native checkpoint is
never taken for one of ours; it runs without FLA where the reference is asked for.

Shapes: s sequence, b batch, c channels, k and v the head sizes; a trailing ``_bsc`` names the axes.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from qwen35_mcore.config.shapes import GdnShape
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.kernels.base import DeltaRuleInputs
from qwen35_mcore.kernels.facts import Workload
from qwen35_mcore.kernels.registry import select_kernels
from qwen35_mcore.mcore.gdn_heads import gather_heads, scatter_heads, without_fla_check
from qwen35_mcore.mcore.imports import (
    CheckpointWithoutOutput,
    GatedDeltaNetSubmodules,
    McoreGatedDeltaNet,
    PackedSeqParams,
    get_cuda_rng_tracker,
    get_parameter_local_cp,
)
from qwen35_mcore.model.layers.float32_parameters import KeepFloat32
from qwen35_mcore.model.layers.gate_projection import GateProjection
from qwen35_mcore.model.layers.norms import GatedRMSNorm
from qwen35_mcore.model.transformer_config import Qwen35TransformerConfig


class _Alone:
    """A process group's size and rank where nobody else takes part."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class _ConvWeight(torch.nn.Conv1d):
    """Read by a call, which runs the hooks that wait for a parameter under
    ``--overlap-param-gather``: reading the attribute would get the last step's values where a
    bucket of gathered parameters begins with it."""

    def forward(self) -> torch.Tensor:  # type: ignore[override]
        """``[channels, 1, width]``"""
        return self.weight


class GatedDeltaNet(KeepFloat32, McoreGatedDeltaNet):
    """Gated delta rule token mixer; ``[s, b, hidden]`` in and out, like a self-attention module.

    Raises:
        KernelError: at build time, when the kernel named by ``config.gdn_kernel`` cannot run here.
    """

    float32_parameters = ("A_log", "dt_bias")
    in_proj_split_names: list[str]
    in_proj_split_sections: tuple[int, ...]
    gate_proj: Any

    def __init__(
        self,
        config: Qwen35TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        **kwargs: Any,
    ) -> None:
        with without_fla_check():
            super().__init__(config, submodules, layer_number, **kwargs)
        self.conv1d.__class__ = _ConvWeight
        self.gated_norm = GatedRMSNorm(config, self.value_head_dim, self.pg_collection.tp)
        self.gate_proj = (
            GateProjection(config, self.num_value_heads, self.pg_collection.tp)
            if self.shape.gates_apart
            else None
        )

    def _setup_variant_attrs(self) -> None:
        super()._setup_variant_attrs()
        self.kernels = select_kernels(
            self.config.gdn_kernel,
            torch.device(torch.cuda.current_device()),
            Workload(self.config.params_dtype, self.key_head_dim, self.value_head_dim),
        )
        self.passes_states = (
            self.cp_size > 1 and self.config.gdn_context_parallel == "state_passing"
        )
        # the ranks that share heads by an all-to-all
        self.head_group = _Alone() if self.passes_states else self.pg_collection.cp
        whole = GdnShape(
            key_heads=self.num_key_heads,
            value_heads=self.num_value_heads,
            key_head_dim=self.key_head_dim,
            value_head_dim=self.value_head_dim,
            gates_apart=bool(self.config.gdn_gates_apart),
        )
        self.tp_shape = whole.split(self.tp_size)
        self.shape = self.tp_shape.split(self.head_group.size())
        if self.shape.gates_apart:
            self.in_proj_extra_dim = 0
            self.in_proj_split_names = self.in_proj_split_names[:4]
            self.in_proj_split_sections = self.in_proj_split_sections[:4]
        # the base class insists on a kernel of this name; forward uses self.kernels
        self.gated_delta_rule = self.kernels.gated_delta_rule

    def reset_parameters(self) -> None:
        """float32 A_log and dt_bias; every tensor-parallel rank draws its own heads."""
        for name in self.float32_parameters:
            old = getattr(self, name)
            new = torch.nn.Parameter(torch.empty_like(old, dtype=torch.float32))
            new.tensor_model_parallel, new.partition_dim = True, 0  # type: ignore[attr-defined]
            setattr(self, name, new)
        if not self.config.perform_initialization:
            return
        with torch.no_grad(), get_cuda_rng_tracker().fork():
            torch.nn.init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
            self.dt_bias.fill_(1.0)
            self.A_log.uniform_(*self.A_init_range).log_()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``[s / (sp * cp), b, hidden]`` to the same shape, and the output bias (None). Raises
        NotImplementedError for inference."""
        if inference_context is not None:
            raise NotImplementedError(
                "GatedDeltaNet has no inference cache yet: this package trains; export the "
                "checkpoint to Hugging Face to generate."
            )
        seq_len = hidden_states.shape[0] * self.sp_size * self.cp_size
        cu_seqlens = self._packed_boundaries(packed_seq_params, hidden_states.shape[1], seq_len)
        context = self._cp_context(seq_len, cu_seqlens, hidden_states.device)

        projected_sbc, _ = self.in_proj(hidden_states)
        projected_sbc, restore_index = gather_heads(
            projected_sbc, self.in_proj_split_sections, self.head_group, cu_seqlens, seq_len
        )
        q, k, v, z_sbc, b, a = self.kernels.prologue(
            projected_sbc, self._local_conv_weight(), self.shape, cu_seqlens, cp_context=context
        )
        if self.gate_proj is not None:
            b, a = self._gates(hidden_states, cu_seqlens, seq_len)
        out_bshv, _ = self.kernels.gated_delta_rule(
            DeltaRuleInputs(
                q_bshk=q,
                k_bshk=k,
                v_bshv=v,
                a_bsh=a,
                b_bsh=b,
                A_log=get_parameter_local_cp(self.A_log, dim=0, cp_group=self.head_group),
                dt_bias=get_parameter_local_cp(self.dt_bias, dim=0, cp_group=self.head_group),
                cu_seqlens=cu_seqlens,
                qk_normalized=context is None and self.kernels.normalizes(self.shape),
                cp_context=context,
            )
        )
        return self._gate_and_project(out_bshv, z_sbc, restore_index)

    def _gates(
        self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor | None, seq_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits b and a ``[b, s, heads]`` from their own projection."""
        logits = self.gate_proj(hidden_states, self.in_proj.layer_norm_weight)
        heads = (logits[0].shape[-1],)
        b, a = (
            gather_heads(part_sbh, heads, self.head_group, cu_seqlens, seq_len)[0]
            .transpose(0, 1)
            .contiguous()
            for part_sbh in logits
        )
        return b, a

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """megatron-core's keys, whether or not b and a have a projection of their own."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata, **kwargs)
        if self.gate_proj is not None:
            state.pop(f"{prefix}gate_proj._extra_state", None)
            key = f"{prefix}gate_proj.weight"
            stored = state[f"{prefix}in_proj.weight"].key
            state[key] = self.gate_proj.checkpoint_factory(state[key], stored)
        return state

    def _packed_boundaries(
        self, packed: PackedSeqParams | None, batch: int, seq_len: int
    ) -> torch.Tensor | None:
        """Cumulative sequence lengths ``[n + 1]`` of packed input, else None."""
        if packed is None or packed.qkv_format != "thd":
            return None
        if batch != 1:
            raise ValueError(f"packed sequences need a batch of 1, got {batch}")
        return self._resolve_cu_seqlens(
            packed.cu_seqlens_q_padded, packed.cu_seqlens_q, seq_len, "cu_seqlens_q", self.cp_size
        )

    def _cp_context(
        self, seq_len: int, cu_seqlens: torch.Tensor | None, device: torch.device
    ) -> Any:
        """What the kernels need to pass states between context-parallel ranks; None if they do not.

        Raises:
            ConfigError: packed sequences, whose states belong to many sequences.
        """
        if not self.passes_states:
            return None
        if cu_seqlens is not None:
            raise ConfigError(
                "packed sequences cannot pass states between context-parallel ranks",
                fix="--gdn-context-parallel all_to_all",
            )
        return self.kernels.cp_context(seq_len, self.pg_collection.cp, self.conv_kernel_dim, device)

    def _local_conv_weight(self) -> torch.Tensor:
        """``[channels, width]`` of the channels this context-parallel rank works on."""
        return get_parameter_local_cp(
            self.conv1d(),
            dim=0,
            cp_group=self.head_group,
            split_sections=list(self.tp_shape.qkv_widths),
        ).squeeze(1)

    def _gate_and_project(
        self, out_bshv: torch.Tensor, z_sbc: torch.Tensor, restore_index: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Norm, gate, way back from heads to sequence, and the output projection."""

        def norm(out_bshv: torch.Tensor, z_sbc: torch.Tensor) -> torch.Tensor:
            y_sbc = self.kernels.epilogue(out_bshv, z_sbc, self.gated_norm(), self.gated_norm.eps)
            return scatter_heads(y_sbc, self.head_group, restore_index)

        if not self.recompute_norm_out:
            return self.out_proj(norm(out_bshv, z_sbc))
        checkpoint = CheckpointWithoutOutput(fp8=self.config.fp8)
        projected, bias = self.out_proj(checkpoint.checkpoint(norm, out_bshv, z_sbc))
        checkpoint.discard_output_and_register_recompute(projected)
        return projected, bias
