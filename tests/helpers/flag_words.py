"""Words of a command line that give any of megatron's flags another value than its default."""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser
from enum import Enum
from typing import Any

from qwen35_mcore.config.model_config import Qwen35Config
from qwen35_mcore.errors import ConfigError
from qwen35_mcore.mcore.megatron_errors import raise_instead_of_usage
from qwen35_mcore.model.transformer_config import architecture_arguments
from qwen35_mcore.training.arguments import run_defaults
from qwen35_mcore.training.flags import check_classes_while_parsing

OF_A_TYPE_OF_ITS_OWN = {
    "linear_attention_freq": "[1,0,1,0]",
    "moe_layer_freq": "2",
    "no_rope_freq": "2",
    "window_size": "8,0",
    "window_attn_skip_freq": "2",
    "cuda_graph_modules": "attn",
    "cuda_graph_scope_deprecated": "attn",
    "moe_input_jitter_eps": "0.5",  # below 1
}


def megatron_parser() -> ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def checking_parser(model_config: Qwen35Config, *, on_cpu: bool) -> ArgumentParser:
    """megatron's parser with a run's defaults, refusing what the table refuses."""
    parser = megatron_parser()
    raise_instead_of_usage(parser)
    flags = [action.dest for action in parser._actions]
    parser.add_argument("--decoder", default="gpt")
    parser.add_argument("--gdn-kernel", default="auto")
    parser.add_argument("--moe-experts", default="auto")
    parser.set_defaults(
        **run_defaults(model_config, on_cpu), **architecture_arguments(model_config)
    )
    check_classes_while_parsing(parser, flags, on_cpu=on_cpu)
    return parser


def actions(parser: ArgumentParser) -> dict[str, Action]:
    """The first action of every destination."""
    found: dict[str, Action] = {}
    for action in parser._actions:
        found.setdefault(action.dest, action)
    return found


def words(action: Action, value: str | None = None) -> list[str]:
    """The flag with ``value``, or with one that is not its default."""
    option = action.option_strings[0]
    if action.nargs == 0:
        return [option]
    value = _other(action) if value is None else value
    return [option, *[value] * (action.nargs if isinstance(action.nargs, int) else 1)]


def _other(action: Action) -> str:
    if action.dest in OF_A_TYPE_OF_ITS_OWN:
        return OF_A_TYPE_OF_ITS_OWN[action.dest]
    if action.choices:
        return next(text for c in action.choices if (text := _text(c)) != _text(action.default))
    if action.type in (int, float) or isinstance(action.default, int | float):
        return str((action.type or type(action.default))((action.default or 0) + 3))
    return "other"


def _text(value: Any) -> str:
    return value.name if isinstance(value, Enum) else str(value)


def following_the_advice(parser: ArgumentParser, given: list[str]) -> tuple[list[str], str]:
    """The words that parse after every ``pass ... as well`` was followed, and the last error that
    gave no such advice (empty where there was none)."""
    for _ in range(5):
        try:
            parser.parse_args(given)
        except ConfigError as error:
            advice = re.search(r"pass (--\S+)(?: (\S+))? as well", error.fix or "")
            if advice is None:
                return given, str(error)
            option, value = advice.groups()
            given = [*given, *words(parser._option_string_actions[option], value)]
        else:
            return given, ""
    raise AssertionError(f"the advice leads on and on: {given}")


GPU_FLAGS = (
    *("--attention-backend", "--cuda-graph-impl", "--cuda-graph-modules"),
    *("--moe-flex-dispatcher-backend", "--moe-expert-rank-capacity-factor"),
)
"""Flags of plans and documents that are refused where there is no GPU."""


def without_gpu_flags(words: list[str]) -> None:
    """Take out of a plan's command line what is refused where there is no GPU; tokens that NCCL EP
    would exchange are exchanged by an all-to-all."""
    words[:] = ["alltoall" if word == "flex" else word for word in words]
    for flag in GPU_FLAGS:
        if flag in words:
            at = words.index(flag)
            del words[at]
            while at < len(words) and not words[at].startswith("-"):
                del words[at]
