"""Every flag of megatron's parser has a class, and what is refused is refused with its reason."""

from __future__ import annotations

import functools
import re
from argparse import ArgumentParser
from pathlib import Path

import pytest

from qwen35_mcore.config.flavors import get_flavor
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.training.flags import (
    ONLY_WITH_A_PACKAGE,
    TABLE,
    Kind,
    Row,
    check_classes_while_parsing,
    class_of,
    counts,
)
from qwen35_mcore.training.flags.table import destination
from tests.helpers.flag_words import (
    actions,
    checking_parser,
    following_the_advice,
    megatron_parser,
    words,
)

REFUSED = [
    (flag, row)
    for flag, rows in TABLE.items()
    for row in rows
    if row.kind is not Kind.FREE and flag not in ONLY_WITH_A_PACKAGE
]
NEEDY = [(flag, row) for flag, rows in TABLE.items() for row in rows if row.needs]
TESTS = Path(__file__).parents[1]
OURS = ("decoder", "gdn_kernel", "moe_experts")


@functools.cache
def parser(flavor: str = "tiny-moe", *, on_cpu: bool = True) -> ArgumentParser:
    return checking_parser(get_flavor(flavor), on_cpu=on_cpu)


@functools.cache
def installed() -> frozenset[str]:
    return frozenset(actions(megatron_parser())) - {"help"}


def named(rows: list[tuple[str, Row]]) -> list[str]:
    return [" ".join([flag, *row.values]) for flag, row in rows]


def test_every_flag_of_the_installed_parser_has_a_class() -> None:
    assert sorted(installed() - TABLE.keys()) == []


def test_every_row_names_a_flag() -> None:
    assert sorted(TABLE.keys() - installed() - ONLY_WITH_A_PACKAGE) == []


def test_one_row_classes_a_flag() -> None:
    rows = {flag: [row for row in TABLE[flag] if not row.values] for flag in TABLE}
    assert [flag for flag, classing in rows.items() if len(classing) != 1] == []


def test_an_option_is_found_as_it_is_written() -> None:
    options = {
        option: action.dest
        for action in megatron_parser()._actions
        for option in action.option_strings
        if option.startswith("--") and option != "--help"
    }
    assert {option: destination(option) for option in options} == options
    assert destination("--flavor") is None


def test_counts_are_of_all_flags() -> None:
    assert sum(counts().values()) == len(TABLE)
    assert all(counts().values())


def test_what_a_flag_needs_exists() -> None:
    choices = {c for _, row in NEEDY for term in row.needs.split() for c in term.split("|")}
    names = {c.partition("=")[0] for c in choices if not c.startswith("package:")}
    assert sorted(names - installed() - {"gpu", "cpu", *OURS}) == []


@pytest.mark.parametrize(("flag", "row"), REFUSED, ids=named(REFUSED))
def test_refusals(flag: str, row: Row) -> None:
    action = actions(parser())[flag]
    given = words(action, row.values[0] if row.values else None)
    if action.nargs == 0 and action.const == action.default:
        parser().parse_args(given)  # it says what is the case
        return
    with pytest.raises(ConfigError) as caught:
        parser().parse_args(given)
    message = str(caught.value)
    assert message.startswith(given[0])
    assert row.why in message
    assert caught.value.fix == row.fix
    assert row.kind is Kind.DECIDED or given[0] in str(caught.value.got)


@pytest.mark.parametrize(("flag", "row"), NEEDY, ids=named(NEEDY))
def test_advice_about_what_a_flag_needs(flag: str, row: Row) -> None:
    """Followed to its end it parses, unless it takes another machine, model or package."""
    value = row.values[0] if row.values else None
    for chosen in (parser(), parser("tiny-dense", on_cpu=False)):
        _, error = following_the_advice(chosen, words(actions(chosen)[flag], value))
        elsewhere = ("a CUDA device", "the package", "a model with")
        assert not error or any(part in error for part in elsewhere)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--hidden-size", "64"], ["contradicts the model", "got: 64", "allowed: 128"]),
        (["--num-experts", "16"], ["contradicts the model", "allowed: 8"]),
        (["--moe-layer-freq", "2"], ["contradicts the model", "got: 2", "allowed: 1"]),
        (["--no-initialization"], ["--no-initialization needs --load or --pretrained-checkpoint"]),
        (["--rampup-batch-size", "2", "2", "9"], ["does nothing here", "--step-batch-size"]),
        (["--ckpt-format", "torch"], ["is not supported", "allowed: torch_dist"]),
        (["--profile"], ["needs a CUDA device or --use-pytorch-profiler"]),
        (["--lr-wsd-decay-iters", "3"], ["pass --lr-decay-style WSD as well, or drop --lr-wsd"]),
        (["--optimizer", "muon"], ["the package emerging_optimizers", "pip install emerging-opt"]),
        (["--moe-router-force-load-balancing", "--save", "x"], ["needs a run without --save"]),
        (["--train-samples", "8", "--train-iters", "4"], ["needs a run without --train-iters"]),
        (["--train-samples", "8", "--lr-warmup-iters", "4"], ["fix: drop --lr-warmup-iters"]),
        (["--train-iters", "4", "--lr-decay-samples", "4"], ["a run without --train-iters"]),
        (
            ["--step-batch-size-schedule", "0:4 2:8", "--global-batch-size", "4"],
            ["--step-batch-size-schedule needs a run without --global-batch-size"],
        ),
        (
            ["--lr-warmup-fraction", "0.1", "--lr-warmup-iters", "2"],
            ["pass --lr-warmup-iters 0 as well, or drop --lr-warmup-fraction"],
        ),
        (["--hybrid-layer-pattern", "GE"], ["pass --decoder hybrid as well, or drop --hybrid-lay"]),
        (
            ["--cpu-offloading-num-layers", "2"],
            ["copies of their experts' weights", "pass --fine-grained-activation-offloading"],
        ),
        (
            ["--decoder", "hybrid", "--fp8-format", "e4m3", "--first-last-layers-bf16"],
            ["--first-last-layers-bf16 needs --decoder gpt"],
        ),
        (
            ["--decoder", "hybrid", "--overlap-moe-expert-parallel-comm"],
            ["--overlap-moe-expert-parallel-comm needs --decoder gpt"],
        ),
        (["--norm-epsilon", "1"], ["--norm-epsilon contradicts the model"]),
    ],
    ids=lambda given: " ".join(given) if given[0].startswith("--") else "",
)
def test_messages(given: list[str], parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        parser().parse_args(given)
    for part in parts:
        assert part in str(caught.value)


def test_a_flag_that_says_what_the_model_says_is_taken() -> None:
    parser().parse_args(["--hidden-size", "128", "--normalization", "RMSNorm", "--swiglu"])
    parser("tiny-dense").parse_args(["--moe-layer-freq", "1", "--softmax-type", "vanilla"])


def test_experts_of_a_dense_model() -> None:
    with pytest.raises(ConfigError, match="--num-experts contradicts the model"):
        parser("tiny-dense").parse_args(["--num-experts", "8"])
    with pytest.raises(ConfigError, match="--moe-z-loss-coeff needs a model with experts"):
        parser("tiny-dense").parse_args(["--moe-z-loss-coeff", "0.001"])


def test_values_of_one_flag() -> None:
    """Some values are refused, others need something, the rest is free."""
    balancing = ["--moe-router-load-balancing-type"]
    parser().parse_args([*balancing, "seq_aux_loss"])
    with pytest.raises(ConfigError, match="pass aux_loss, seq_aux_loss, global_aux_loss or none"):
        parser().parse_args([*balancing, "aux_loss", "sinkhorn"])
    modules = ["--recompute-granularity", "selective", "--recompute-modules"]
    parser().parse_args([*modules, "core_attn", "moe_act"])
    with pytest.raises(ConfigError, match="--recompute-modules layernorm needs a CUDA device"):
        parser().parse_args([*modules, "core_attn", "layernorm"])
    parser(on_cpu=False).parse_args([*modules, "layernorm"])
    with pytest.raises(ConfigError, match="--recompute-modules moe needs a model with experts"):
        parser("tiny-dense").parse_args([*modules, "moe"])


def test_muon_takes_bf16_where_it_is_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    for sharded in (["muon", "--use-distributed-optimizer"], ["dist_muon"]):
        with pytest.raises(ConfigError, match="needs --bf16") as caught:
            parser().parse_args(["--optimizer", *sharded])
        assert "pass --bf16 as well" in str(caught.value.fix)
        parser().parse_args(["--optimizer", *sharded, "--bf16"])
    parser().parse_args(["--optimizer", "muon"])


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--optimizer-cuda-graph"], "a run without --optimizer-cuda-graph"),
        (["--fp8-format", "hybrid", "--fp8-param-gather"], "a run without --fp8-param-gather"),
        (["--num-distributed-optimizer-instances", "2"], "-distributed-optimizer-instances 1"),
    ],
)
def test_what_muon_cannot_be_combined_with(
    more: list[str], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    sharded = ["--use-distributed-optimizer", "--bf16"]
    with pytest.raises(ConfigError, match=part):
        parser(on_cpu=False).parse_args(["--optimizer", "muon", *sharded, *more])


def test_a_flag_of_a_newer_megatron_is_refused() -> None:
    newer = megatron_parser()
    newer.add_argument("--of-tomorrow", action="store_true")
    check_classes_while_parsing(newer, ["of_tomorrow"], on_cpu=True)
    with pytest.raises(ConfigError, match="--of-tomorrow is newer than this package"):
        newer.parse_args(["--of-tomorrow"])


def test_a_list_that_is_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    twice = ["--data-path", "a", "--lr", "1", "--data-path", "b", "c", "--lr", "2"]
    assert parser().parse_args(twice).data_path == ["b", "c"]
    assert capsys.readouterr().out == (
        "> --data-path is given 2 times, and the last counts: --data-path b c\n"
    )


def test_a_class_has_a_reason() -> None:
    assert class_of("softmax_type").kind is Kind.DECIDED
    assert class_of("reset_attention_mask").kind is Kind.NO_EFFECT
    assert all(row.why for rows in TABLE.values() for row in rows)


def test_what_is_said_to_be_tested_is_there() -> None:
    known = actions(megatron_parser())
    text = "".join(file.read_text() for file in TESTS.rglob("*.py"))
    for flag, row in ((flag, row) for flag, rows in TABLE.items() for row in rows):
        named = re.findall(r"tests/[\w/.]*\w", row.why)
        assert all((TESTS.parent / path).exists() for path in named), flag
        if named and row.kind is Kind.FREE and "tests/parity/test_flags_function.py" not in named:
            spelled = (flag, *known[flag].option_strings)
            assert any(re.search(rf"(?<![\w-]){word}\b", text) for word in spelled), flag
