"""The rules a parallel layout must obey. Each is a generator over a `Case`; adding one means
writing it and naming it in `RULES`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.config.vision import VisionConfig
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.parallel.layout import ParallelLayout
from qwen35_mcore.parallel.stages import parse_pipeline_layout, stage_problems
from qwen35_mcore.parallel.violation import Violation

FP8_MULTIPLE = 16
"""Transformer Engine's FP8 products need every width to be a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What the rules look at. None means unknown: a rule that needs the value stays silent."""

    model_config: Qwen35Config
    layout: ParallelLayout
    seq_length: int | None
    world_size: int | None
    micro_batch_size: int | None
    global_batch_size: int | None
    fp8: bool
    vision: VisionConfig | None = None

    @property
    def world(self) -> int | None:
        """Ranks in all, from the world size or from dp."""
        if self.world_size is None and self.layout.dp is not None:
            return self.layout.model_size * self.layout.dp
        return self.world_size

    @property
    def dp(self) -> int | None:
        """Data parallel size, given or what remains of a world that divides."""
        if self.layout.dp is not None or self.world is None:
            return self.layout.dp
        return None if self.world % self.layout.model_size else self.world // self.layout.model_size


Rule = Callable[[Case], Iterator[Violation]]


def tensor_parallel(case: Case) -> Iterator[Violation]:
    """TP splits heads, feed-forward widths and the vocabulary into equal parts."""
    model_config, tp = case.model_config, case.layout.tp
    split = {
        "num_attention_heads": model_config.num_attention_heads,
        "linear_num_key_heads": model_config.linear_num_key_heads,
        "linear_num_value_heads": model_config.linear_num_value_heads,
        "intermediate_size": model_config.intermediate_size,
        "shared_expert_intermediate_size": model_config.shared_expert_intermediate_size,
        "vocab_size": model_config.vocab_size,
    }
    usable = _list(
        one
        for one in _divisors(gcd(*split.values()))
        if _kv_heads_fit(model_config.num_key_value_heads, one)
    )
    reasons = {
        "vocab_size": "the vocabulary is never padded, because padding would join the softmax"
    }
    for name, size in split.items():
        if size % tp:
            yield Violation(
                rule=f"tp divides {name}",
                reason=reasons.get(name, "every TP rank holds the same part of it"),
                value=f"tp {tp}, {name} {size}",
                allowed=f"tp {_list(_divisors(size))}",
                fix=f"set tp to {usable}",
            )


def kv_heads(case: Case) -> Iterator[Violation]:
    """KV heads are split over TP ranks, or each is shared by a whole number of them."""
    heads, tp = case.model_config.num_key_value_heads, case.layout.tp
    if not _kv_heads_fit(heads, tp):
        yield Violation(
            rule="tp fits num_key_value_heads",
            reason="TP ranks hold whole KV heads, or share each KV head evenly",
            value=f"tp {tp}, num_key_value_heads {heads}",
            allowed=f"a divisor or a multiple of {heads}",
            fix=f"set tp to {_list(_divisors(heads))}, or a multiple of {heads}",
        )


def gdn_context_parallel(case: Case) -> Iterator[Violation]:
    """GDN under CP trades sequence for heads in an all-to-all, unless states are passed."""
    model_config, layout = case.model_config, case.layout
    if layout.cp == 1 or not model_config.num_gdn_layers:
        return
    if layout.gdn_cp == "state_passing":
        yield from _part_fits_convolution(case)
        return
    both = layout.tp * layout.cp
    if model_config.linear_num_key_heads % both:
        yield Violation(
            rule="tp * cp divides linear_num_key_heads",
            reason="context parallel GDN gathers the sequence and splits the key heads left by TP",
            value=f"tp {layout.tp} * cp {layout.cp} = {both}, "
            f"linear_num_key_heads {model_config.linear_num_key_heads}",
            allowed=f"tp * cp {_list(_divisors(model_config.linear_num_key_heads))}",
            fix="lower cp or tp; training can also pass --gdn-context-parallel state_passing",
        )


def _part_fits_convolution(case: Case) -> Iterator[Violation]:
    """Where states are passed, a part gets the convolution's past from one part alone."""
    past = case.model_config.linear_conv_kernel_dim - 1
    if case.seq_length is not None and case.seq_length // (2 * case.layout.cp) < past:
        yield Violation(
            rule="seq_length / (2 * cp) holds the convolution's past",
            reason="the convolution of a GDN looks back into the part before, and no further",
            value=f"sequence length {case.seq_length}, cp {case.layout.cp}",
            allowed=f"parts of at least {past} tokens",
            fix="lower cp or lengthen the sequence",
        )


def experts(case: Case) -> Iterator[Violation]:
    """EP hands out whole experts, ETP splits each expert's width."""
    model_config, layout = case.model_config, case.layout
    if not model_config.is_moe:
        if layout.ep > 1:
            yield Violation(
                rule="ep needs experts",
                reason="expert parallelism spreads experts, and a dense model has none",
                value=f"ep {layout.ep}",
                allowed="ep 1",
                fix="set ep to 1",
            )
        return
    if model_config.num_experts % layout.ep:
        yield Violation(
            rule="ep divides num_experts",
            reason="every EP rank holds the same number of experts",
            value=f"ep {layout.ep}, num_experts {model_config.num_experts}",
            allowed=f"ep {_list(_divisors(model_config.num_experts))}",
            fix="change ep",
        )
    if model_config.moe_intermediate_size % layout.expert_tp:
        yield Violation(
            rule="etp divides moe_intermediate_size",
            reason="every ETP rank holds the same part of each expert",
            value=f"etp {layout.expert_tp}, "
            f"moe_intermediate_size {model_config.moe_intermediate_size}",
            allowed=f"etp {_list(_divisors(model_config.moe_intermediate_size))}",
            fix="change etp (left out, it is tp)",
        )
    if layout.tp > 1 and not layout.sequence_parallel:
        yield Violation(
            rule="moe with tp needs sequence_parallel",
            reason="without it every TP rank routes every token, and Megatron refuses to train",
            value=f"tp {layout.tp}, sequence_parallel off",
            allowed="sequence_parallel on, or tp 1",
            fix="switch sequence parallelism on",
        )


def world(case: Case) -> Iterator[Violation]:
    """Dense and expert parts each tile the world."""
    layout, size = case.layout, case.world
    if size is None:
        return
    expert = layout.ep * layout.expert_tp * layout.pp
    products = {"tp * pp * cp": layout.model_size}
    if case.model_config.is_moe:
        products["ep * etp * pp"] = expert
    for name, product in products.items():
        if size % product:
            yield Violation(
                rule=f"{name} divides the world size",
                reason="the ranks form equal groups, each with one copy of the model",
                value=f"{name} = {product}, world size {size}",
                allowed=f"a world size that is a multiple of {product}",
                fix="change the number of ranks or a parallel size",
            )
    if layout.dp is not None and layout.model_size * layout.dp != size:
        yield Violation(
            rule="tp * pp * cp * dp is the world size",
            reason="every rank has exactly one place",
            value=f"{layout.model_size} * {layout.dp}, world size {size}",
            allowed=f"a world size of {layout.model_size * layout.dp}",
            fix="leave dp out, or correct it",
        )


def sequence(case: Case) -> Iterator[Violation]:
    """CP and sequence parallelism split the sequence, and RoPE is meant up to a length."""
    layout, length = case.layout, case.seq_length
    if length is None:
        return
    # two chunks per CP rank, one from either end, so that causal work is balanced
    parts = 2 * layout.cp if layout.cp > 1 else 1
    parts *= layout.tp if layout.sequence_parallel else 1
    if length < 1 or length % parts:
        yield Violation(
            rule="the sequence splits evenly",
            reason="CP cuts it into 2 * cp chunks (zigzag), sequence parallelism into tp parts",
            value=f"sequence length {length}, cp {layout.cp}, tp {layout.tp}, "
            f"sequence_parallel {'on' if layout.sequence_parallel else 'off'}",
            allowed=f"a multiple of {parts}",
            fix=f"use a sequence length of {max(1, round(length / parts)) * parts}",
        )
    longest = case.model_config.max_position_embeddings
    if length > longest:
        yield Violation(
            rule="the sequence is within max_position_embeddings",
            reason="the rotary embedding is not meant for longer positions",
            value=f"sequence length {length}",
            allowed=f"up to {longest}",
            fix="shorten the sequence, or use a config with YaRN",
        )


def pipeline(case: Case) -> Iterator[Violation]:
    """Every virtual stage gets its layers, from an even split or from a layout string."""
    layout, layers = case.layout, case.model_config.num_hidden_layers
    if layout.vpp > 1 and layout.pp == 1:
        yield Violation(
            rule="vpp needs pp",
            reason="the interleaved schedule passes activations between pipeline ranks",
            value=f"vpp {layout.vpp}, pp 1",
            allowed="vpp 1, or pp of at least 2",
            fix="set vpp to 1",
        )
    if layout.pipeline_layout is not None:
        yield from _stages(case, layout.pipeline_layout)
    elif layers % (layout.pp * layout.vpp):
        yield Violation(
            rule="pp * vpp divides num_hidden_layers",
            reason="without a layout string every virtual stage has the same number of layers",
            value=f"pp {layout.pp} * vpp {layout.vpp}, num_hidden_layers {layers}",
            allowed=f"pp * vpp {_list(_divisors(layers))}",
            fix="change pp or vpp, or give a pipeline layout string",
        )


def batch(case: Case) -> Iterator[Violation]:
    """The global batch is a whole number of microbatches on every data parallel rank."""
    micro, whole, dp, layout = (
        case.micro_batch_size,
        case.global_batch_size,
        case.dp,
        case.layout,
    )
    if micro is None or whole is None or dp is None:
        return
    step = micro * dp
    if whole < 1 or step < 1 or whole % step:
        yield Violation(
            rule="micro batch * dp divides the global batch",
            reason="every data parallel rank runs the same number of microbatches",
            value=f"global batch {whole}, micro batch {micro}, dp {dp}",
            allowed=f"a multiple of {step}",
            fix="change the global or the micro batch size",
        )
    elif layout.vpp > 1 and (whole // step) % layout.pp:
        yield Violation(
            rule="pp divides the microbatches",
            reason="the interleaved schedule runs microbatches in groups of pp",
            value=f"{whole // step} microbatches, pp {layout.pp}",
            allowed=f"a multiple of {layout.pp} microbatches",
            fix=f"use a global batch that is a multiple of {step * layout.pp}",
        )


def fp8_widths(case: Case) -> Iterator[Violation]:
    """Every FP8 matrix has widths per rank that the kernels take."""
    if not case.fp8:
        return
    for name, width, parts in _matrix_widths(case):
        # a width that does not split at all is another rule's business
        if width % parts == 0 and (width // parts) % FP8_MULTIPLE:
            yield Violation(
                rule=f"fp8 width of {name}",
                reason="FP8 products need such a width on each rank",
                value=f"{width} / {parts} = {width // parts}",
                allowed=f"a multiple of {FP8_MULTIPLE}",
                fix="lower tp (or etp), or train in bf16" if parts > 1 else "train in bf16",
            )


def vision_tower(case: Case) -> Iterator[Violation]:
    """TP splits the tower's blocks and merger, and they were tested in bfloat16 and float32."""
    if case.vision is None:
        return
    tp = case.layout.tp
    for name in ("num_heads", "intermediate_size", "merged_width"):
        size = getattr(case.vision, name)
        if size % tp:
            yield Violation(
                rule=f"tp divides the vision tower's {name}",
                reason="every TP rank holds the same part of it",
                value=f"tp {tp}, {name} {size}",
                allowed=f"tp {_list(_divisors(size))}",
                fix="lower tp",
            )
    if case.fp8:
        yield Violation(
            rule="the vision tower trains without fp8",
            reason="FP8 was not tested with a vision tower",
            value="fp8",
            allowed="bf16",
            fix="train in bf16",
        )


RULES: tuple[Rule, ...] = (
    tensor_parallel,
    kv_heads,
    gdn_context_parallel,
    experts,
    world,
    sequence,
    pipeline,
    batch,
    fp8_widths,
    vision_tower,
)


def _stages(case: Case, text: str) -> Iterator[Violation]:
    layout, model_config = case.layout, case.model_config

    def violation(problem: str, allowed: str) -> Violation:
        return Violation(
            rule="the pipeline layout fits the model",
            reason=problem,
            value=text,
            allowed=allowed,
            fix="correct it, or take the string that `qwen35 plan --explain` finds for these sizes",
        )

    try:
        stages = parse_pipeline_layout(text)
    except ConfigError as error:
        yield violation(error.what, error.allowed or "")
        return
    wanted = layout.pp * layout.vpp
    if len(stages) != wanted:
        yield violation(
            f"it has {len(stages)} stages, pp {layout.pp} * vpp {layout.vpp} need {wanted}",
            f"{wanted} stages",
        )
        return
    for problem in stage_problems(
        stages,
        num_layers=model_config.num_hidden_layers,
        num_mtp_layers=model_config.mtp_num_hidden_layers,
        standalone_mtp=layout.standalone_mtp,
        pp=layout.pp,
    ):
        yield violation(
            problem,
            f"E, {model_config.num_hidden_layers} t, {model_config.mtp_num_hidden_layers} m, L",
        )


def _matrix_widths(case: Case) -> Iterator[tuple[str, int, int]]:
    """(name, global width, ranks that split it) of every input or output of an FP8 product."""
    model_config, tp, etp = case.model_config, case.layout.tp, case.layout.expert_tp
    yield "hidden_size", model_config.hidden_size, 1
    if model_config.num_gdn_layers:
        gdn = model_config.gdn_shape  # FP8 runs give the logits b and a another projection
        yield "the GDN input projection", gdn.qkvz_width, tp
        yield "the GDN output projection", gdn.value_width, tp
    attention = model_config.attention_shape
    yield "the attention qkv projection", attention.qkv_width, tp
    yield "the attention output projection", attention.query_width, tp
    if model_config.is_moe:
        yield "the experts", model_config.moe_intermediate_size, etp
        yield "the shared expert", model_config.shared_expert_intermediate_size, tp
    else:
        yield "the feed-forward layer", model_config.intermediate_size, tp


def _kv_heads_fit(heads: int, tp: int) -> bool:
    return heads % tp == 0 or tp % heads == 0


def _divisors(number: int, limit: int = 512) -> list[int]:
    return [one for one in range(1, min(number, limit) + 1) if number % one == 0]


def _list(numbers: Iterator[int] | list[int]) -> str:
    return ", ".join(map(str, numbers))
