"""Parallel layouts: each rule broken alone, the advice followed, and the layout string checked
against Megatron's own parser."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from qwen35_mcore.config.flavors import FLAVORS, get_flavor
from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.parallel.check import check_layout, refuse_violations
from qwen35_mcore.parallel.layout import ParallelLayout
from qwen35_mcore.parallel.stages import parse_pipeline_layout, stage_problems
from tests.helpers.kinds import examples

MOE, DENSE = get_flavor("35b-a3b"), get_flavor("27b")
THREE_KV = replace(get_flavor("tiny-dense"), num_attention_heads=12, num_key_value_heads=3)


def rules(config: Qwen35Config, layout: ParallelLayout, **run: Any) -> list[str]:
    return [violation.rule for violation in check_layout(config, layout, **run)]


@pytest.mark.parametrize("name", FLAVORS)
def test_one_rank_runs_everything(name: str) -> None:
    everything = {
        "seq_length": 4096,
        "world_size": 1,
        "micro_batch_size": 1,
        "global_batch_size": 3,
        "fp8": True,
    }
    assert rules(FLAVORS[name], ParallelLayout(), **everything) == []


@pytest.mark.parametrize(
    ("config", "layout", "run"),
    [
        (MOE, {"pp": 2, "ep": 8}, {"world_size": 16}),
        (MOE, {"tp": 2, "cp": 8, "ep": 8, "etp": 1, "sequence_parallel": True}, {"world_size": 16}),
        (MOE, {"tp": 4, "sequence_parallel": True}, {"world_size": 4, "fp8": True}),
        (DENSE, {"tp": 8, "pp": 4, "vpp": 2}, {"world_size": 64}),
        (DENSE, {"tp": 8, "etp": 8}, {"world_size": 8}),
        (THREE_KV, {}, {"world_size": 5}),
    ],
)
def test_layouts_that_run(
    config: Qwen35Config, layout: dict[str, Any], run: dict[str, Any]
) -> None:
    assert rules(config, ParallelLayout(**layout), **run) == []


@pytest.mark.parametrize(
    ("config", "layout", "run", "broken"),
    [
        (replace(DENSE, vocab_size=248321), {"tp": 2}, {}, "tp divides vocab_size"),
        (replace(DENSE, intermediate_size=17409), {"tp": 2}, {}, "tp divides intermediate_size"),
        (DENSE, {"tp": 16}, {}, "tp divides num_attention_heads"),
        (
            replace(DENSE, num_attention_heads=32, linear_num_key_heads=24),
            {"tp": 16},
            {},
            "tp divides linear_num_key_heads",
        ),
        (
            replace(MOE, shared_expert_intermediate_size=511),
            {"tp": 2, "sequence_parallel": True},
            {},
            "tp divides shared_expert_intermediate_size",
        ),
        (THREE_KV, {"tp": 2}, {}, "tp fits num_key_value_heads"),
        (MOE, {"cp": 32}, {}, "tp * cp divides linear_num_key_heads"),
        (DENSE, {"tp": 4, "cp": 8}, {}, "tp * cp divides linear_num_key_heads"),
        (
            MOE,
            {"cp": 32, "gdn_cp": "state_passing"},
            {"seq_length": 128},
            "seq_length / (2 * cp) holds the convolution's past",
        ),
        (DENSE, {"ep": 2}, {}, "ep needs experts"),
        (MOE, {"ep": 3}, {}, "ep divides num_experts"),
        (MOE, {"etp": 3}, {}, "etp divides moe_intermediate_size"),
        (MOE, {"tp": 2}, {}, "moe with tp needs sequence_parallel"),
        (MOE, {"ep": 8}, {"world_size": 12}, "ep * etp * pp divides the world size"),
        (MOE, {"etp": 2, "ep": 2}, {"world_size": 6}, "ep * etp * pp divides the world size"),
        (MOE, {"ep": 8}, {"world_size": None, "dp": 12}, "ep * etp * pp divides the world size"),
        (DENSE, {"tp": 8}, {"world_size": 12}, "tp * pp * cp divides the world size"),
        (DENSE, {"tp": 8, "dp": 2}, {"world_size": 8}, "tp * pp * cp * dp is the world size"),
        (DENSE, {"cp": 4}, {"seq_length": 4100}, "the sequence splits evenly"),
        (
            DENSE,
            {"tp": 8, "sequence_parallel": True},
            {"seq_length": 4100},
            "the sequence splits evenly",
        ),
        (
            DENSE,
            {"tp": 8, "cp": 2, "sequence_parallel": True},
            {"seq_length": 4096 + 16},
            "the sequence splits evenly",
        ),
        (DENSE, {}, {"seq_length": 262145}, "the sequence is within max_position_embeddings"),
        (DENSE, {"pp": 3}, {}, "pp * vpp divides num_hidden_layers"),
        (DENSE, {"pp": 4, "vpp": 3}, {}, "pp * vpp divides num_hidden_layers"),
        (DENSE, {"vpp": 2}, {}, "vpp needs pp"),
        (
            DENSE,
            {},
            {"world_size": 4, "micro_batch_size": 2, "global_batch_size": 12},
            "micro batch * dp divides the global batch",
        ),
        (
            DENSE,
            {"pp": 4, "vpp": 2},
            {"world_size": 4, "micro_batch_size": 1, "global_batch_size": 6},
            "pp divides the microbatches",
        ),
        (replace(MOE, moe_intermediate_size=40), {}, {"fp8": True}, "fp8 width of the experts"),
        (replace(DENSE, hidden_size=5128), {}, {"fp8": True}, "fp8 width of hidden_size"),
    ],
)
def test_each_rule_alone(
    config: Qwen35Config, layout: dict[str, Any], run: dict[str, Any], broken: str
) -> None:
    layout = layout | {"dp": run["dp"]} if "dp" in run else layout
    run = {key: value for key, value in run.items() if key != "dp"}
    assert rules(config, ParallelLayout(**layout), **run) == [broken]


def test_states_are_passed_between_more_ranks_than_key_heads() -> None:
    layout = ParallelLayout(cp=32, gdn_cp="state_passing")
    assert rules(MOE, layout, seq_length=32 * 2 * 3) == []
    with pytest.raises(ConfigError, match="all_to_all or state_passing"):
        ParallelLayout(gdn_cp="states")


def test_what_is_unknown_is_not_judged() -> None:
    assert rules(DENSE, ParallelLayout(tp=8, pp=4, cp=2)) == []
    # the widths that fp8 refuses are fine in bf16
    assert rules(MOE, ParallelLayout(tp=8, sequence_parallel=True)) == []


def test_etp_follows_tp_when_left_out() -> None:
    assert ParallelLayout(tp=4).expert_tp == 4
    assert ParallelLayout(tp=4, etp=1).expert_tp == 1
    odd = replace(MOE, moe_intermediate_size=511)
    layout = ParallelLayout(tp=2, sequence_parallel=True)
    assert rules(odd, layout) == ["etp divides moe_intermediate_size"]
    assert rules(odd, replace(layout, etp=1)) == []


@given(st.sampled_from(list(FLAVORS)), st.integers(1, 40))
def test_the_advice_on_tp_works(name: str, tp: int) -> None:
    config = FLAVORS[name]
    violations = check_layout(config, ParallelLayout(tp=tp, etp=1, sequence_parallel=True))
    assume(violations)
    advised = [
        one
        for v in violations
        if v.rule == "tp divides num_attention_heads"
        for one in re.findall(r"\d+", v.fix)
    ]
    for one in advised:
        assert rules(config, ParallelLayout(tp=int(one), etp=1, sequence_parallel=True)) == []


@given(st.integers(1, 10_000), st.integers(1, 8), st.sampled_from([1, 2, 4]), st.booleans())
def test_the_advice_on_sequence_length_works(length: int, cp: int, tp: int, sp: bool) -> None:
    layout = ParallelLayout(tp=tp, cp=cp, sequence_parallel=sp)
    for violation in check_layout(DENSE, layout, seq_length=length):
        if violation.rule == "the sequence splits evenly":
            advised = int(violation.fix.rsplit(" ", 1)[1])
            assert violation.rule not in rules(DENSE, layout, seq_length=advised)


def test_the_error_lists_every_violation_with_what_to_do() -> None:
    layout = ParallelLayout(tp=3, ep=3, dp=1)
    violations = check_layout(MOE, layout, world_size=4, seq_length=100)
    assert len(violations) > 5
    with pytest.raises(ConfigError) as caught:
        refuse_violations(violations)
    for violation in violations:
        for part in (violation.rule, violation.value, violation.allowed, violation.fix):
            assert part
            assert part in str(caught.value)
    layout = ParallelLayout(pp=2, ep=8)
    refuse_violations(check_layout(MOE, layout, world_size=16, seq_length=4096))


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2", None])
def test_sizes_are_positive_integers(size: Any) -> None:
    with pytest.raises(ConfigError, match="tp must be a positive integer"):
        ParallelLayout(tp=size)


class TestLayoutString:
    @pytest.mark.parametrize(
        ("text", "stages"),
        [
            ("E|t|L", ("E", "t", "L")),
            ("Et*3|tmL", ("Ettt", "tmL")),
            ("E,t,|,(tt|)*2,m|L", ("Et", "tt", "tt", "m", "L")),
            ("E(t|)*3L", ("Et", "t", "t", "L")),
            ("E|(t*2|)*2L", ("E", "tt", "tt", "L")),
            ("E||*2tL", ("E", "", "", "tL")),
        ],
    )
    def test_grammar(self, text: str, stages: tuple[str, ...]) -> None:
        assert parse_pipeline_layout(text) == stages

    @pytest.mark.parametrize(
        ("text", "rest"),
        [
            ("Et|x|L", "x|L"),
            ("Et |L", " |L"),
            ("E(tt)|L", "(tt)|L"),
            ("E((t|)*2|)*2L", "((t|)*2|)*2L"),
            ("Et*|L", "*|L"),
            ("Et*2*3|L", "*3|L"),
            ("E(t|*2L", "(t|*2L"),
        ],
    )
    def test_outside_the_grammar_the_message_shows_where(self, text: str, rest: str) -> None:
        with pytest.raises(ConfigError, match=re.escape(f"from {rest!r} on")):
            parse_pipeline_layout(text)

    @given(
        st.recursive(
            st.sampled_from(["E", "t", "m", "L", "|", ","]),
            lambda inner: st.lists(inner, min_size=1, max_size=5).map("".join),
            max_leaves=8,
        ),
        st.lists(
            st.tuples(st.sampled_from(["t", "tt|", "t*2|", "|", "m"]), st.integers(1, 4)),
            max_size=4,
        ),
    )
    def test_megatron_reads_the_same(self, plain: str, groups: list[tuple[str, int]]) -> None:
        text = plain + "".join(f"({body})*{times}" for body, times in groups) + "t*3|L"
        letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
        theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
        read = tuple("".join(letters[layer.name] for layer in stage) for stage in theirs)
        assert parse_pipeline_layout(text) == read

    @examples(300)
    @given(data=st.data())
    def test_megatron_judges_the_same(self, data: st.DataObject) -> None:
        pp, vpp = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        mtp = data.draw(st.integers(0, 1))
        layers = list("E" + "t" * 4 + "m" * mtp + "L")
        if data.draw(st.booleans()):
            layers = data.draw(st.permutations(layers))
        if data.draw(st.integers(0, 3)) == 0:
            layers.insert(data.draw(st.integers(0, len(layers))), data.draw(st.sampled_from("Etm")))
        cuts = data.draw(
            st.lists(st.integers(0, len(layers)), min_size=pp * vpp - 1, max_size=pp * vpp - 1).map(
                sorted
            )
        )
        bounds = [0, *cuts, len(layers)]
        stages = tuple("".join(layers[a:b]) for a, b in pairwise(bounds))
        theirs = PipelineParallelLayerLayout("|".join(stages), pp)
        try:
            theirs.validate_layer_layout(num_layers=4, mtp_num_layers=mtp)
            accepted = True
        except AssertionError:
            accepted = False
        problems = list(
            stage_problems(stages, num_layers=4, num_mtp_layers=mtp, standalone_mtp=True, pp=pp)
        )
        assert accepted == (not problems), problems

    CONFIG = get_flavor("tiny-moe")

    def problems(self, text: str, **layout: Any) -> list[str]:
        violations = check_layout(self.CONFIG, ParallelLayout(pipeline_layout=text, **layout))
        assert {v.rule for v in violations} <= {"the pipeline layout fits the model"}
        assert all(v.value == text for v in violations)
        return [v.reason for v in violations]

    @pytest.mark.parametrize(
        ("text", "layout"),
        [
            ("EttttmL", {}),
            ("Et*3|tmL", {"pp": 2}),
            ("E|t|t|ttmL", {"pp": 2, "vpp": 2}),
            ("Et|t|t|t|m|L", {"pp": 3, "vpp": 2, "standalone_mtp": True}),
        ],
    )
    def test_layouts_that_run(self, text: str, layout: dict[str, Any]) -> None:
        assert self.problems(text, **layout) == []

    @pytest.mark.parametrize(
        ("text", "layout", "problem"),
        [
            ("Et|ttmL", {"pp": 2}, "it has 3 t, the model has 4"),
            ("Et|tttL", {"pp": 2}, "it has 0 m, the model has 1"),
            ("Ett|ttmLL", {"pp": 2}, "it has 2 L, the model has 1"),
            ("tE|tttmL", {"pp": 2}, "E (the embedding) must come first"),
            ("Ettt|tLm", {"pp": 2}, "L (the loss) must come last"),
            ("Et|tmttL", {"pp": 2}, "m (MTP) must come after every t"),
            ("Ett|ttm|L", {"pp": 3}, "m (MTP) must be in the last virtual stage, together with L"),
            ("Ettt|tmL", {"pp": 3}, "it has 2 stages, pp 3 * vpp 1 need 3"),
            ("Ettt|tmL", {"pp": 2, "vpp": 2}, "it has 2 stages, pp 2 * vpp 2 need 4"),
            (
                "Ett|ttm||L",
                {"pp": 2, "vpp": 2, "standalone_mtp": True},
                "m (MTP) must be on a rank's last virtual stage, one of the last 2 stages",
            ),
            ("Ettt|tm?L", {"pp": 2}, "the pipeline layout cannot be read from '?L' on"),
        ],
    )
    def test_layouts_that_do_not(self, text: str, layout: dict[str, Any], problem: str) -> None:
        assert self.problems(text, **layout) == [problem]

    def test_a_layout_string_replaces_the_even_split(self) -> None:
        uneven = replace(MOE, num_hidden_layers=41, layer_types=())
        layout = ParallelLayout(pp=2, pipeline_layout="Et*21|t*20mL")
        assert rules(uneven, layout) == []
        assert rules(uneven, replace(layout, pipeline_layout=None)) == [
            "pp * vpp divides num_hidden_layers"
        ]
