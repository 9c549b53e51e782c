"""The memory model: parameters of a rank, what the distributed optimizer holds, activations."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen35_mcore.config.counts import count_parameters
from qwen35_mcore.config.flavors import FLAVORS, get_flavor
from qwen35_mcore.config.layer_pattern import LayerKind
from qwen35_mcore.config.matrices import matrix_weights
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.kernels import grouped_linear
from qwen35_mcore.parallel.parameters import Parameters, part_parameters
from qwen35_mcore.parallel.stages import parse_pipeline_layout
from qwen35_mcore.planner import activations
from qwen35_mcore.planner.calibration.rows import default_calibration, model_of
from qwen35_mcore.planner.candidate import Candidate, Job, Microbatch
from qwen35_mcore.planner.communication import Group, gather
from qwen35_mcore.planner.hardware import GIB, get_gpu
from qwen35_mcore.planner.layers import Model
from qwen35_mcore.planner.memory import GRAPH_POOL, WEIGHT, kept, padding_bytes, static_bytes
from qwen35_mcore.planner.prediction import predict_split

H100 = get_gpu("h100-80g")


def job_of(config: Qwen35Config, gpus: int, **changes: object) -> Job:
    return replace(
        Job(
            model_config=config,
            gpu=get_gpu("h100-80g"),
            gpus=gpus,
            seq_length=4096,
            global_batch_size=64,
            calibration=default_calibration("h100-80g"),
        ),
        **changes,  # type: ignore[arg-type]
    )


def all_parameters(config: Qwen35Config, candidate: Candidate) -> Parameters:
    kinds = Model(job_of(config, 64), candidate).kinds
    return sum((part_parameters(config, candidate, kind) for kind in kinds), Parameters())


@pytest.mark.parametrize("flavor", FLAVORS)
def test_one_rank_holds_the_whole_model(flavor: str) -> None:
    config = FLAVORS[flavor]
    held = all_parameters(config, Candidate())
    assert held.count == count_parameters(config).total
    assert held.expert == pytest.approx(
        count_parameters(config).experts.total * (1 + 1 / config.num_hidden_layers)
        if config.is_moe
        else 0
    )


@pytest.mark.parametrize("flavor", ["2b", "27b", "35b-a3b"])
def test_a_pipeline_holds_one_more_embedding(flavor: str) -> None:
    """The last stage's copy: of MTP, or of the tied output layer."""
    config = FLAVORS[flavor]
    more = all_parameters(config, Candidate(pp=2)).count - count_parameters(config).total
    assert more == config.vocab_size * config.hidden_size


def megatron_bytes(config: Qwen35Config, candidate: Candidate, job: Job) -> float:
    """megatron-core's own estimate of weights, gradients and optimizer state."""
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory

    moe = config.is_moe
    arguments = SimpleNamespace(
        kv_channels=config.head_dim,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        group_query_attention=True,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        ffn_hidden_size=config.intermediate_size,
        num_experts=config.num_experts if moe else None,
        moe_layer_freq=1,
        moe_ffn_hidden_size=config.moe_intermediate_size,
        moe_router_topk=config.num_experts_per_tok,
        moe_shared_expert_intermediate_size=config.shared_expert_intermediate_size or None,
        moe_shared_expert_gate=True,
        moe_latent_size=None,
        mtp_num_layers=None,
        add_bias_linear=False,
        swiglu=True,
        normalization="RMSNorm",
        multi_latent_attention=False,
        padded_vocab_size=config.vocab_size,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        tensor_model_parallel_size=candidate.tp,
        pipeline_model_parallel_size=candidate.pp,
        expert_tensor_parallel_size=candidate.etp,
        expert_model_parallel_size=candidate.ep,
        world_size=job.gpus,
        data_parallel_size=candidate.dp(job),
        use_distributed_optimizer=True,
    )
    return compute_weight_and_optimizer_memory(arguments)


@pytest.mark.parametrize("flavor", ["9b", "35b-a3b"])
@pytest.mark.parametrize("candidate", [Candidate(), Candidate(tp=2), Candidate(tp=2, ep=4)])
def test_static_memory_is_megatrons_where_that_applies(flavor: str, candidate: Candidate) -> None:
    """megatron knows neither GatedDeltaNet, nor the output gate, nor q and k norms, nor what joins
    MTP to the model: full attention everywhere, no MTP, and the two known gaps added."""
    config = get_flavor(flavor)
    if not config.is_moe:
        candidate = replace(candidate, ep=1, etp=candidate.tp)
    layers = config.num_hidden_layers
    config = replace(config, layer_types=(LayerKind.ATTENTION,) * layers, mtp_num_hidden_layers=0)
    job = job_of(config, gpus=16)
    ours = sum(static_bytes(all_parameters(config, candidate), job, candidate))
    query = config.num_attention_heads * config.head_dim
    missing = layers * (config.hidden_size * query + 2 * config.head_dim) / candidate.tp
    gap = sum(static_bytes(Parameters(dense=missing), job, candidate))
    megatron = megatron_bytes(config, candidate, job)
    if candidate.tp > 1:
        assert ours - gap == pytest.approx(megatron, rel=1e-5)
    else:
        assert ours - gap == pytest.approx(megatron, rel=1e-12)


@pytest.mark.parametrize(("experts", "measured_gib"), [(32, 10.5), (256, 17.1)])
def test_activations_of_the_measured_stack(experts: int, measured_gib: float) -> None:
    """tests/bench/NOTES.md: three GDN and one attention layer of 35b-a3b widths, 4 x 4096 tokens,
    no optimizer; the peak is at the begin of the backward pass. No kernel added gradients to main
    ones, so that of one weight of every expert was there."""
    model = model_of(
        "35b-a3b",
        {"num_hidden_layers": 4, "num_experts": experts, "mtp_num_hidden_layers": 0},
    )
    alone = Candidate(micro_batch_size=4)
    kinds = Model(job_of(model, 1), alone).kinds.strip("EL")
    layers = [kept(Microbatch(model, alone, 4096), kind) for kind in kinds]
    weights = WEIGHT * sum(part_parameters(model, alone, kind).count for kind in kinds)
    saved = sum(layer.saved for layer in layers)
    gradient = WEIGHT * experts * 2 * model.moe_intermediate_size * model.hidden_size
    peak = weights + saved + max(layer.transient for layer in layers) + gradient
    assert peak / GIB == pytest.approx(measured_gib, rel=0.05)


sizes = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 4]),
        "ep": st.sampled_from([1, 2, 8]),
        "micro_batch_size": st.sampled_from([1, 2, 4]),
        "precision": st.sampled_from(["bf16", "fp8-blockwise"]),
    }
)


@settings(max_examples=40, deadline=None)
@given(sizes=sizes, flavor=st.sampled_from(["9b", "35b-a3b", "397b-a17b"]))
def test_recomputing_more_keeps_less(sizes: dict, flavor: str) -> None:
    config = get_flavor(flavor)
    if not config.is_moe:
        sizes = {**sizes, "ep": 1, "etp": sizes["tp"]}
    for kind in "gam":
        none, selective, full = (
            kept(Microbatch(config, Candidate(**sizes, recompute=recompute), 4096), kind)
            for recompute in ("none", "selective", "full")
        )
        assert none.saved > selective.saved > full.saved > 0
        # what is dropped comes back for the layer whose backward pass runs
        assert none.saved + none.transient <= full.saved + full.transient


@settings(max_examples=30, deadline=None)
@given(sizes=sizes)
def test_activations_grow_with_the_microbatch_and_shrink_with_tp(sizes: dict) -> None:
    config = get_flavor("397b-a17b")

    def saved(**changes: object) -> float:
        batch = Microbatch(config, Candidate(**sizes | changes), 4096)
        return (activations.gdn(batch) + activations.moe(batch)).saved

    twice = saved(micro_batch_size=2 * sizes["micro_batch_size"])
    assert twice == pytest.approx(2 * saved())
    assert saved(tp=2 * sizes["tp"]) < saved()


@pytest.mark.parametrize(
    ("cross_entropy", "kept_by_each", "besides"), [("te", 2, 2), ("native", 4, 6)]
)
def test_logits_are_counted_for_every_loss(
    cross_entropy: str, kept_by_each: int, besides: int
) -> None:
    """248,320 columns for the main loss and MTP's: Transformer Engine's bfloat16 copy, and the
    logits while a loss is made; megatron's float32 softmax, another such copy and the logits."""
    config, candidate = get_flavor("35b-a3b"), Candidate(cross_entropy=cross_entropy)
    logits = 4096 * config.vocab_size
    with_mtp, without = (
        activations.output(Microbatch(one, candidate, 4096))
        for one in (config, replace(config, mtp_num_hidden_layers=0))
    )
    assert with_mtp.saved - without.saved == kept_by_each * logits
    assert with_mtp.transient == besides * logits


def test_memory_of_a_rank_adds_up() -> None:
    job = job_of(get_flavor("35b-a3b"), gpus=16, global_batch_size=512)
    prediction = predict_split(job, Candidate(pp=2, ep=8), ("E" + "t" * 20, "t" * 20 + "mL"))
    first, last = prediction.memory()
    assert first.total == sum(vars(first).values())
    # the first rank has two microbatches in flight, the last one
    batch = Microbatch(job.model_config, prediction.candidate, 4096)
    twenty = 15 * kept(batch, "g").saved + 5 * kept(batch, "a").saved
    assert first.activations == pytest.approx(2 * twenty)
    assert last.activations > twenty


@pytest.mark.parametrize(
    ("optimizer", "precision", "gradient", "state"),
    [
        ("adam", "bf16", 4, 4 + 4 + 4),
        ("precision-aware", "bf16", 2, 2 + 2 + 2),
        ("precision-aware", "fp8-blockwise", 2, 4 + 2 + 2),
    ],
)
def test_an_optimizer_takes_so_many_bytes_a_parameter(
    optimizer: str, precision: str, gradient: int, state: int
) -> None:
    job = job_of(get_flavor("35b-a3b"), 16, optimizer=optimizer)
    candidate = Candidate(ep=8, precision=precision)
    held = Parameters(dense=1600.0, expert=80.0)
    _, gradients, states = static_bytes(held, job, candidate)
    assert gradients == gradient * 1680
    assert states == state * (1600 / 16 + 80 / 2)


def test_muon_has_one_moment_of_a_matrix_and_whole_matrices() -> None:
    """Matrices are those of `config.matrices`; where ranks outnumber them, every rank's buffers
    have room for the largest."""
    config, candidate = get_flavor("35b-a3b"), Candidate(ep=8)
    held = all_parameters(config, candidate)
    dense, expert = (
        [one.elements for one in held.matrices if one.expert == expert] for expert in (False, True)
    )
    assert 8 * sum(expert) + sum(dense) == sum(one.parameters for one in matrix_weights(config))
    assert sum(expert) == held.expert
    adam, muon = (job_of(config, 16, optimizer=name) for name in ("adam", "muon"))
    less = static_bytes(held, adam, candidate)[2] - static_bytes(held, muon, candidate)[2]
    assert less == pytest.approx(4 * (sum(dense) / 16 + sum(expert) / 2))
    assert padding_bytes(held, adam, candidate) == 0 == padding_bytes(held, muon, candidate)
    many = replace(muon, gpus=1024)
    more_dense = max(0.0, max(dense) - sum(dense) / 1024)
    more_expert = max(0.0, max(expert) - sum(expert) / 128)
    assert more_expert > 0
    expected = more_dense * (8 + 1024 * 6) + more_expert * (8 + 128 * 6)
    assert padding_bytes(held, many, candidate) == pytest.approx(expected)


def test_nccl_ep_keeps_its_buffers_rows_and_a_graph_its_pool() -> None:
    config = get_flavor("35b-a3b")
    plain, nccl_ep, graph = (
        Candidate(ep=8, **more)
        for more in ({}, {"dispatcher": "ncclep"}, {"dispatcher": "ncclep", "graphs": "full"})
    )
    rows = 4096 * 8
    more = [activations.moe(Microbatch(config, one, 4096)).saved for one in (plain, nccl_ep)]
    assert more[1] - more[0] == rows * (2 * 2048 + 6 * 512)
    assert activations.dispatcher_buffer(Microbatch(config, nccl_ep, 4096)) == 0
    models = [Model(job_of(config, 8), one) for one in (plain, nccl_ep, graph)]
    staged, pool = (b.overhead_bytes - a.overhead_bytes for a, b in pairwise(models))
    assert staged == 2 * rows * 2 * 2048
    assert pool == pytest.approx(GRAPH_POOL * models[2].workspace_bytes)
    loss = min(models[2].part["L"].kept.saved, models[2].workspace_bytes)
    kept = models[1].chain.saved_bytes[-1] + loss
    more = models[2].chain.saved_bytes[-1] - models[1].chain.saved_bytes[-1]
    assert more == pytest.approx(GRAPH_POOL * kept)


@pytest.mark.parametrize("stages", ["Et*16|t*16mL", "Et*8|(t*8|)*2t*8mL"])
def test_the_pool_of_a_graph_is_of_the_microbatches_in_flight(stages: str) -> None:
    """On each pipeline rank, in the tables as in the search. On the last one also of the loss,
    which is over before a layer takes its workspace."""
    job, split = job_of(get_flavor("9b"), 2), parse_pipeline_layout(stages)
    parts, full = (
        predict_split(job, Candidate(pp=2, vpp=len(split) // 2, graphs=graphs), split)
        for graphs in ("parts", "full")
    )
    workspace = full.model.workspace_bytes
    loss = min(full.model.part["L"].kept.saved, workspace)
    besides = job.usable_bytes - full.model.capacity_bytes
    held = full.splits.rank_bytes(full.cuts)
    for rank, (eager, graphed) in enumerate(zip(parts.memory(), full.memory(), strict=True)):
        pool = GRAPH_POOL * (eager.activations + workspace + rank * loss)
        assert graphed.overhead - eager.overhead == pytest.approx(pool)
        assert replace(graphed, overhead=eager.overhead) == eager
        assert graphed.total == pytest.approx(held[rank] + besides)


def test_every_shape_of_a_weight_has_one_placeholder() -> None:
    """On a rank: GDN and attention, whose output projections are alike, experts and the shared one,
    what joins MTP to the model, which is like an output projection; embedding and output layer."""
    config = get_flavor("35b-a3b")
    layers = 2048 * (2 * 2048 + 2 * 4096) + 2048 * 4096 + 2048 * (2 * 4096 + 2 * 512)
    layers += (1 + 256 // 8) * 3 * 512 * 2048
    table = 248320 * 2048
    stages = ("E" + "t" * 10, "t" * 10, "t" * 10, "t" * 10 + "mL")
    for cuts, tables in ((("".join(stages),), [1]), (stages, [1, 0, 0, 1])):
        job = job_of(config, 32, headroom_bytes=75 * GIB)
        candidate = Candidate(pp=len(cuts), ep=8)
        prediction = predict_split(job, candidate, cuts)
        assert prediction.model.placeholder_bytes == 2 * layers
        transient = prediction.model.workspace_bytes
        for memory, own in zip(prediction.memory(), tables, strict=True):
            assert memory.workspace == pytest.approx(transient + 2 * layers + own * 2 * table)
        assert prediction.missing_bytes > 0
        missing = sum(max(0.0, m.total - job.usable_bytes) for m in prediction.memory())
        assert prediction.missing_bytes == pytest.approx(missing)


def test_many_experts_need_no_room_for_their_gradient() -> None:
    assert activations.FEWEST_EXPERTS == grouped_linear.FEWEST_EXPERTS
    config = get_flavor("35b-a3b")
    few, many = (
        activations.moe(Microbatch(config, Candidate(ep=ep), 4096)).transient for ep in (16, 8)
    )
    assert few - many == pytest.approx(2 * 16 * 512 * 2048)


def test_fewer_key_heads_than_ranks_gather_the_projection() -> None:
    """Queries, gates, keys and values of all heads on every rank, forward and backward; TP 2
    still divides two key heads."""
    config = get_flavor("35b-a3b")
    assert config.num_key_value_heads == 2
    whole = Microbatch(config, Candidate(tp=4), 4096)
    each = activations.qkv_projection(whole)
    assert each == 2 * config.head_dim * (2 * config.num_attention_heads + 2 * 2)
    divided = Microbatch(replace(config, num_key_value_heads=4), Candidate(tp=4), 4096)
    assert activations.attention(divided).saved < 4096 * each
    assert activations.attention(whole).saved > 4096 * each
    assert activations.attention(whole).transient > 4096 * each
    narrow, wide = (Model(job_of(config, 8), Candidate(tp=tp)) for tp in (2, 4))
    for model, gathered in ((narrow, 0.0), (wide, gather(4096 * each, Group(4), H100))):
        gdn, own = ([term for term in model.part[kind].terms if term.name == "tp"] for kind in "ga")
        for which in (1, 2):  # forward, backward
            more = sum(term[which] for term in own) - sum(term[which] for term in gdn)
            assert more == pytest.approx(gathered)
