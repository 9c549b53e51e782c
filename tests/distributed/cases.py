"""The parallel modes that are proven equal to the serial run.

``python -m tests.distributed.cases`` runs them and prints the table of README.md beside this file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.helpers.distributed import worker_pool
from tests.helpers.equivalence import Case, compare
from tests.helpers.toys import NEXT
from tests.helpers.training import Layout

MOE: dict[str, Any] = {"mtp_num_hidden_layers": 1}
DENSE: dict[str, Any] = {"moe": False, "mtp_num_hidden_layers": 1, "tie_word_embeddings": True}
QWEN3_NEXT: dict[str, Any] = NEXT | {"mtp_num_hidden_layers": 1}
PLAIN: dict[str, Any] = {}  # MoE without MTP
ODD: dict[str, Any] = {
    "num_hidden_layers": 5,
    "layer_types": ("linear_attention", "full_attention", *["linear_attention"] * 3),
    "mtp_num_hidden_layers": 1,
}
EIGHT: dict[str, Any] = {"num_hidden_layers": 8, "mtp_num_hidden_layers": 1}
FULL_RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SELECTIVE_RECOMPUTE = {
    "recompute_granularity": "selective",
    "recompute_modules": ["core_attn", "moe_act", "shared_experts", "gdn_norm_out"],
}
GATES_APART = {"gdn_gates_apart": True}  # as FP8 runs have them
STATES = {"gdn_context_parallel": "state_passing"}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
PER_MICROBATCH = {"calculate_per_token_loss": False}


def _aux(kind: str) -> dict[str, Any]:
    return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.01}


CASES = [
    Case("TP2 dense without SP", 2, Layout(tp=2, sp=False), DENSE),
    Case("TP2 dense with SP", 2, Layout(tp=2), DENSE),
    Case("TP2 MoE with SP", 2, Layout(tp=2), MOE),
    Case("TP4, 2 KV heads", 4, Layout(tp=4), MOE),
    Case("TP4 dense, 1 KV head", 4, Layout(tp=4, sp=False), DENSE | {"num_key_value_heads": 1}),
    Case("PP2 MoE", 2, Layout(pp=2), MOE),
    Case("PP2 dense, tied embeddings", 2, Layout(pp=2), DENSE),
    Case("PP4", 4, Layout(pp=4), MOE),
    Case("PP2 x VPP2", 2, Layout(pp=2, vpp=2), MOE),
    Case("PP4 x VPP2", 4, Layout(pp=4, vpp=2), EIGHT),
    Case("PP2, uneven layout, MTP last", 2, Layout(pp=2, stages="Ettt|tmL"), MOE),
    Case(
        "PP2 x VPP2, uneven layout, 5 layers",
        2,
        Layout(pp=2, vpp=2, stages="Et|tt|t|tmL"),
        ODD,
    ),
    Case("EP2", 2, Layout(ep=2), MOE),
    Case("EP4", 4, Layout(ep=4), MOE),
    Case("EP2, all-gather dispatcher", 2, Layout(ep=2, run=ALLGATHER), PLAIN),
    Case("TP2 x ETP2", 2, Layout(tp=2, etp=2), MOE),
    Case("TP2 x EP2 (ETP1)", 2, Layout(tp=2, ep=2), MOE),
    Case("CP2 (all-to-all GDN)", 2, Layout(cp=2), MOE),
    Case("CP2 dense", 2, Layout(cp=2), DENSE),
    Case("CP4", 4, Layout(cp=4), PLAIN),
    Case("CP2 x TP2", 4, Layout(cp=2, tp=2), MOE),
    Case("DP2", 2, Layout(), MOE),
    Case("DP2 dense, no distributed optimizer", 2, Layout(distributed_optimizer=False), DENSE),
    Case("DP4, overlapped reduce and gather", 4, Layout(overlap=True), MOE),
    Case("PP2 x DP2, overlapped", 4, Layout(pp=2, overlap=True), MOE),
    Case("TP2 x PP2 x EP2", 4, Layout(tp=2, pp=2, ep=2), MOE),
    Case("PP2 x VPP2 x EP2", 4, Layout(pp=2, vpp=2, ep=2), MOE),
    Case("CP2 x TP2, gates apart", 4, Layout(cp=2, tp=2, run=GATES_APART), MOE),
    Case("CP2 (states passed)", 2, Layout(cp=2, run=STATES), MOE, micro_batch_size=2),
    Case(
        "CP2 (states passed), selective recompute",
        2,
        Layout(cp=2, run=STATES | SELECTIVE_RECOMPUTE),
        MOE,
    ),
    Case(
        "CP2 x PP2 (states passed), full recompute",
        4,
        Layout(cp=2, pp=2, run=STATES | FULL_RECOMPUTE),
        MOE,
    ),
    Case(
        "CP4 (states passed), 2 key heads",
        4,
        Layout(cp=4, run=STATES),
        PLAIN | {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    ),
    Case(
        "CP2 x TP2 (states passed), gates apart",
        4,
        Layout(cp=2, tp=2, run=STATES | GATES_APART),
        MOE,
    ),
    Case("microbatch of 4", 1, Layout(run=_aux("none")), MOE, micro_batch_size=4),
    Case("full recompute", 1, Layout(run=FULL_RECOMPUTE), MOE),
    Case("selective recompute", 1, Layout(run=SELECTIVE_RECOMPUTE), MOE),
    Case("TP2 x EP2, full recompute", 2, Layout(tp=2, ep=2, run=FULL_RECOMPUTE), MOE),
    Case("PP2, selective recompute", 2, Layout(pp=2, run=SELECTIVE_RECOMPUTE), MOE),
    Case("TP2 x EP2, aux_loss", 2, Layout(tp=2, ep=2, run=_aux("aux_loss")), MOE),
    Case("PP2, seq_aux_loss", 2, Layout(pp=2, run=_aux("seq_aux_loss")), MOE),
    Case("CP2, aux_loss", 2, Layout(cp=2, run=_aux("aux_loss")), MOE),
    Case("CP2, global_aux_loss", 2, Layout(cp=2, run=_aux("global_aux_loss")), MOE),
    Case("TP2 x EP2, global_aux_loss", 2, Layout(tp=2, ep=2, run=_aux("global_aux_loss")), MOE),
]

CASES += [
    Case("CP2, loss per microbatch", 2, Layout(cp=2, run=PER_MICROBATCH), MOE),
    Case("DP2, loss per microbatch", 2, Layout(run=PER_MICROBATCH), MOE),
    *(
        Case(f"{name}, unequal masks", world, layout, MOE, masked=True)
        for name, world, layout in [
            ("DP2", 2, Layout(run=_aux("aux_loss"))),
            ("EP2", 2, Layout(ep=2, run=_aux("aux_loss"))),
            ("CP2", 2, Layout(cp=2)),
            ("PP2", 2, Layout(pp=2)),
        ]
    ),
    Case("DP2, unequal masks, global_aux_loss", 2, Layout(), PLAIN, masked=True),
    Case("CP2, documents", 2, Layout(cp=2, packed=True), MOE, masked=True),
    Case("CP2, documents, microbatch of 2", 2, Layout(cp=2, packed=True), MOE, 2, masked=True),
    Case(
        "CP2, documents, seq_aux_loss and z-loss",
        2,
        Layout(cp=2, packed=True, run=_aux("seq_aux_loss") | {"moe_z_loss_coeff": 1e-2}),
        MOE,
    ),
    Case("CP2 dense, documents", 2, Layout(cp=2, packed=True), DENSE, masked=True),
    Case("CP4, documents", 4, Layout(cp=4, packed=True), PLAIN),
    Case("CP2 x TP2, documents", 4, Layout(cp=2, tp=2, packed=True), MOE, masked=True),
    Case("CP2 x PP2, documents", 4, Layout(cp=2, pp=2, packed=True), MOE, masked=True),
    Case("CP2 x EP4, documents", 4, Layout(cp=2, ep=4, packed=True), PLAIN, masked=True),
    Case("EP2, Qwen3-Next", 2, Layout(ep=2), QWEN3_NEXT),
    Case("TP2, Qwen3-Next", 2, Layout(tp=2), QWEN3_NEXT),
    Case("PP2, Qwen3-Next", 2, Layout(pp=2), QWEN3_NEXT),
]

HYBRID = [
    *(
        replace(case, name=f"{case.name}, hybrid", layout=replace(case.layout, decoder="hybrid"))
        for case in CASES
    ),
    *(
        Case(name, world, replace(layout, decoder="hybrid"), model)
        for name, world, layout, model in [
            ("PP2, cut inside a layer", 2, Layout(pp=2, pattern="GEGEG|E*E/*E"), MOE),
            ("PP2, the last stage a feed-forward", 2, Layout(pp=2, pattern="GEGEGE*|E/*E"), MOE),
            ("PP2, embedding alone", 2, Layout(pp=2, pattern="|GEGEGE*E/*E"), MOE),
            (
                "PP2 x VPP2, cut inside layers, tied embeddings",
                2,
                Layout(pp=2, vpp=2, pattern="G-G|-|G-*|-/*-"),
                DENSE,
            ),
            (
                "PP2 x EP2, cut inside a layer, full recompute",
                2 * 2,
                Layout(pp=2, ep=2, pattern="GEGEG|E*E/*E", run=FULL_RECOMPUTE),
                MOE,
            ),
        ]
    ),
    Case(
        "CP2 x PP2, cut inside a layer, documents, hybrid",
        4,
        Layout(cp=2, pp=2, packed=True, decoder="hybrid", pattern="GEGEG|E*E/*E"),
        MOE,
        masked=True,
    ),
]
"""The same with the hybrid decoder, each against the gpt decoder in one process."""
CASES += [
    Case("FSDP of optimizer state, DP2 dense", 2, Layout(fsdp="optim"), DENSE),
    Case("FSDP of optimizer state, overlapped", 2, Layout(fsdp="optim", overlap=True), MOE),
    Case("FSDP of gradients, too, EP2 x DP2", 4, Layout(fsdp="optim_grads", ep=2), MOE),
    *(
        Case(
            f"FSDP of parameters, too, {name}",
            world,
            replace(layout, fsdp="optim_grads_params"),
            model,
        )
        for name, world, layout, model in [
            ("DP2 dense, tied embeddings", 2, Layout(), DENSE),
            ("EP2 x DP2", 4, Layout(ep=2), MOE),
            ("TP2 x EP2 x DP2", 4, Layout(tp=2, ep=2), MOE),
            ("TP2 x ETP2 x DP2", 4, Layout(tp=2, etp=2), MOE),
            ("CP2 x DP2", 4, Layout(cp=2), MOE),
            ("full recompute", 2, Layout(run=FULL_RECOMPUTE), MOE),
            ("loss per microbatch", 2, Layout(run=PER_MICROBATCH), MOE),
        ]
    ),
]


def main() -> None:
    """Print the table of differences in markdown."""
    pool = worker_pool()
    print("| mode | ranks | largest loss difference of a token | largest gradient difference |")
    print("| --- | --- | --- | --- |")
    for case in CASES + HYBRID:
        d = compare(pool, case)
        print(f"| {case.name} | {case.world} | {d.token_loss:.1e} | {d.gradient:.1e} |", flush=True)
    pool.close()


if __name__ == "__main__":
    main()
