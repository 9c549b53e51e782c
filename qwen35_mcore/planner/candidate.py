"""What is asked of the planner, one answer to try, and what a rank then works on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qwen35_mcore.config.images import Images
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.parallel.layout import ParallelLayout
from qwen35_mcore.planner.calibration.rows import Calibration
from qwen35_mcore.planner.hardware import PRECISIONS, Gpu

RECOMPUTE = ("none", "selective", "full")
"""Nothing; `recompute_modules`; every layer from its input."""
SWITCHES = {
    "recompute": RECOMPUTE,
    "precision": PRECISIONS,
    "dispatcher": ("alltoall", "ncclep"),
    "graphs": ("none", "parts", "full"),
}
"""Words of a candidate. Experts' rows are exchanged by megatron's all-to-all, or by NCCL EP, which
sorts them into a buffer of fixed size. CUDA graphs are of attention, GDN, router or MLP (parts), or
one of all passes of a step."""
CAPACITY_FACTOR = 2
"""Rows of NCCL EP's receive buffer over those of even routing, which is what training takes."""
OPTIMIZERS = ("adam", "precision-aware", "muon")


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A training run to be laid out. Compared by identity, which caches rely on."""

    model_config: Qwen35Config
    gpu: Gpu
    gpus: int
    seq_length: int
    global_batch_size: int
    """Sequences per optimizer step."""
    calibration: Calibration
    images: Images | None = None
    """Of a run that trains the vision tower."""
    headroom_bytes: int = 0
    """Memory of each GPU that a plan leaves free."""
    optimizer: str = "adam"
    model_name: str = ""
    """How the command line names the model, for reports."""
    model_flags: tuple[str, ...] = ()
    """The training script's flags that choose the model."""

    @property
    def usable_bytes(self) -> int:
        """What a plan may take of a GPU's memory."""
        return self.gpu.memory_bytes - self.headroom_bytes

    @property
    def gpus_of_a_node(self) -> int:
        """GPUs that the job takes of every node: as many as divide all of them."""
        return max(n for n in range(1, self.gpu.gpus_per_node + 1) if self.gpus % n == 0)

    @property
    def nodes(self) -> int:
        return self.gpus // self.gpus_of_a_node


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Every size and switch that the planner chooses."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    micro_batch_size: int = 1
    recompute: str = "none"
    precision: str = "bf16"
    dispatcher: str = "alltoall"
    graphs: str = "none"
    cross_entropy: str = "te"
    """Whose kernels make the losses: Transformer Engine's, which is training's default on a GPU, or
    megatron's (native), with which some measurements were made."""

    @property
    def sequence_parallel(self) -> bool:
        """Always on under TP: MoE needs it, and it saves memory everywhere."""
        return self.tp > 1

    @property
    def fp8(self) -> bool:
        return self.precision != "bf16"

    def dp(self, job: Job) -> int:
        """Data parallel size, of the dense part."""
        return job.gpus // (self.tp * self.pp * self.cp)

    def expert_dp(self, job: Job) -> int:
        """Ranks that hold the same experts."""
        return job.gpus // (self.etp * self.ep * self.pp)

    def microbatches(self, job: Job) -> int:
        """Microbatches per optimizer step and rank."""
        return job.global_batch_size // (self.micro_batch_size * self.dp(job))

    def layout(self, pipeline_layout: str | None = None) -> ParallelLayout:
        """The same as `parallel.check_layout` wants it."""
        sizes = {name: getattr(self, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp")}
        return ParallelLayout(
            **sizes, sequence_parallel=self.sequence_parallel, pipeline_layout=pipeline_layout
        )

    def __str__(self) -> str:
        """As ``--explain`` reads it."""
        names = ("tp", "pp", "vpp", "ep", "cp", *(["etp"] if self.etp != 1 else []))
        sizes = [f"{name}={getattr(self, name)}" for name in names]
        sizes.append(f"mbs={self.micro_batch_size}")
        words = [f"{name}={getattr(self, name)}" for name in SWITCHES]
        usual = ("dispatcher=alltoall", "graphs=none")
        return ",".join([*sizes, *(word for word in words if word not in usual)])


def recompute_modules(model_config: Qwen35Config) -> tuple[str, ...]:
    """What ``recompute=selective`` recomputes, as ``--recompute-modules`` names it: what is large
    to keep and cheap to do again, activations and GDN's gated norm, or a dense layer's SwiGLU."""
    own = ("gdn_norm_out",) if model_config.num_gdn_layers else ()
    return (*own, "moe_act" if model_config.is_moe else "mlp")


@dataclass(frozen=True)
class Microbatch:
    """What one rank works on in one microbatch, before any formula."""

    model_config: Qwen35Config
    candidate: Candidate
    seq_length: int
    images: Images | None = None

    @cached_property
    def tokens(self) -> int:
        """Tokens inside tensor parallel regions: the rank's part of the sequence, all of TP."""
        return self.candidate.micro_batch_size * self.seq_length // self.candidate.cp

    @cached_property
    def patches(self) -> int:
        """Of images, of which every rank of TP and CP sees all."""
        assert self.images is not None
        return self.candidate.micro_batch_size * self.images.patches_of_a_sequence

    @cached_property
    def own_tokens(self) -> int:
        """Tokens between them, where sequence parallelism splits the sequence over TP."""
        return self.tokens // self.candidate.tp

    @cached_property
    def expert_rows(self) -> int:
        """Rows that a rank's experts see when routing is balanced."""
        return self.own_tokens * self.candidate.etp * self.model_config.num_experts_per_tok

    @cached_property
    def kept_rows(self) -> int:
        """Rows of the tensors that hold them: the receive buffer's behind NCCL EP."""
        return self.expert_rows * (CAPACITY_FACTOR if self.candidate.dispatcher == "ncclep" else 1)
