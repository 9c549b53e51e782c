"""How a model is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from qwen35_mcore.errors import ConfigError

GDN_CONTEXT_PARALLEL = ("all_to_all", "state_passing")
"""How context-parallel ranks share a GatedDeltaNet; the first is the default."""


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Sizes of the parallel dimensions.

    Raises:
        ConfigError: from the constructor, when a size is not a positive integer.
    """

    tp: int = 1
    """Tensor parallel size of attention, GDN, dense and shared-expert layers, and vocabulary."""
    pp: int = 1
    """Pipeline stages, one per rank."""
    vpp: int = 1
    """Virtual stages per pipeline rank (interleaved schedule); 1 is none."""
    cp: int = 1
    """Context parallel size: ranks that share one sequence."""
    gdn_cp: str = "all_to_all"
    """How CP ranks share a GDN: "all_to_all" of heads, or "state_passing"."""
    ep: int = 1
    """Expert parallel size: ranks that share one layer's experts."""
    etp: int | None = None
    """Tensor parallel size inside an expert; None means `tp`, as in Megatron."""
    dp: int | None = None
    """Data parallel size; None leaves it to the world size."""
    sequence_parallel: bool = False
    """Whether the TP ranks also split the sequence between layers."""
    pipeline_layout: str | None = None
    """Megatron's layout string, or None for the same number of layers in every stage."""
    standalone_mtp: bool = False
    """Allow a pipeline layout with MTP in a stage without the loss."""

    def __post_init__(self) -> None:
        if self.gdn_cp not in GDN_CONTEXT_PARALLEL:
            allowed = " or ".join(GDN_CONTEXT_PARALLEL)
            raise ConfigError(
                "no such way of context parallelism", got=self.gdn_cp, allowed=allowed
            )
        for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp"):
            value = getattr(self, name)
            if value is None and name in ("etp", "dp"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a positive integer", got=value)

    @property
    def expert_tp(self) -> int:
        """The tensor parallel size inside an expert."""
        return self.tp if self.etp is None else self.etp

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the dense part: tp * pp * cp."""
        return self.tp * self.pp * self.cp
