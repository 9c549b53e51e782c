"""Refuse what the table of flags refuses, before megatron acts on any flag."""

from __future__ import annotations

import importlib.util
import os
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.training.flags.rows import Kind, Row
from qwen35_mcore.training.flags.table import TABLE

PIP_NAMES = {
    "emerging_optimizers": "emerging-optimizers",
    "nvidia_resiliency_ext": "nvidia-resiliency-ext",
    "pynvml": "nvidia-ml-py",
}
NOT_A_FLAG = {
    "num_experts": "a model with experts",
    "num_experts=None": "a model without experts",
    "mtp_num_layers": "a model with MTP",
}
"""What only the choice of the model brings about."""


@dataclass(frozen=True)
class CommandLine:
    """What was parsed, and what its flags are measured by.

    Args:
        args: what was parsed.
        without: what an empty command line parses to; a flag that agrees with it says nothing.
        options: how each destination is written.
        on_cpu: whether the run has no CUDA device.
    """

    args: Namespace
    without: Namespace
    options: dict[str, str]
    on_cpu: bool


def check_classes_while_parsing(
    parser: ArgumentParser, flags: Iterable[str], *, on_cpu: bool
) -> None:
    """Let the parser refuse what the table refuses; megatron acts on some flags as it parses.

    Args:
        parser: with its final defaults.
        flags: destinations that the table has to class; others are left alone.
    """
    parse, classed = parser.parse_args, frozenset(flags)

    def parse_args(args: Any = None, namespace: Any = None) -> Namespace:
        words = sys.argv[1:] if args is None else list(args)
        line = CommandLine(parse(words, namespace), parse([]), _options(parser), on_cpu)
        _say_which_counts(parser, words, line.args)
        _check_classes(line, {f: word for f, word in _given(parser, words) if f in classed})
        return line.args

    parser.parse_args = parse_args  # type: ignore[method-assign, assignment]


def _say_which_counts(parser: ArgumentParser, words: list[str], args: Namespace) -> None:
    """A list that is given twice looks like one of both, and argparse takes the last."""
    lists = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    given = Counter(word for word in _given(parser, words) if word[0] in lists)
    for (flag, as_written), times in given.items():
        if times > 1 and os.environ.get("RANK", "0") == "0":
            value = _command(as_written, getattr(args, flag))
            print(f"> {as_written} is given {times} times, and the last counts: {value}")


def _check_classes(line: CommandLine, given: dict[str, str]) -> None:
    """Check every given flag (destination: as it was written) against its rows.

    Raises:
        ConfigError: for the first flag that contradicts the model, is refused, lacks what it works
            beside, or has no class.
    """
    for flag, as_written in given.items():
        value, default = getattr(line.args, flag), getattr(line.without, flag)
        if value == default:
            continue
        if flag not in TABLE:
            raise ConfigError(
                f"{as_written} is newer than this package, which does not know what it would do",
                fix="drop the flag",
            )
        rows = [r for r in TABLE[flag] if not r.values or set(_texts(value)) & set(r.values)]
        for row in rows:
            _check(row, as_written, value, default)
        for row in rows:
            _check_needs(row, as_written, value, line)


def _options(parser: ArgumentParser) -> dict[str, str]:
    return {a.dest: a.option_strings[0] for a in reversed(parser._actions) if a.option_strings}


def _given(parser: ArgumentParser, words: list[str]) -> Iterable[tuple[str, str]]:
    for word in words:
        option = word.partition("=")[0]
        action = parser._option_string_actions.get(option)
        if action is not None:
            yield action.dest, option


def _check(row: Row, as_written: str, value: Any, default: Any) -> None:
    if row.kind is Kind.FREE:
        return
    what = {
        Kind.DECIDED: "contradicts the model",
        Kind.NO_EFFECT: "does nothing here",
        Kind.UNSUPPORTED: "is not supported",
    }[row.kind]
    plain = default is None or isinstance(default, bool | list)
    raise ConfigError(
        f"{as_written} {what}: {row.why}",
        got=" ".join(_texts(value)) if row.kind is Kind.DECIDED else _command(as_written, value),
        allowed=repr(default) if row.kind is Kind.DECIDED else None if plain else str(default),
        fix=row.fix,
    )


def _check_needs(row: Row, as_written: str, value: Any, line: CommandLine) -> None:
    subject = " ".join([as_written, *(text for text in _texts(value) if text in row.values)])
    for term in row.needs.split():
        choices = term.split("|")
        if any(_holds(choice, line) for choice in choices):
            continue
        described = " or ".join(_described(choice, line.options) for choice in choices)
        raise ConfigError(
            f"{subject} needs {described}",
            got=_command(as_written, value),
            fix=_fix(subject, choices, line.options),
        )


def _holds(choice: str, line: CommandLine) -> bool:
    if choice in ("gpu", "cpu"):
        return line.on_cpu == (choice == "cpu")
    if choice.startswith("package:"):
        return importlib.util.find_spec(choice.removeprefix("package:")) is not None
    flag, equals, wanted = choice.partition("=")
    value = getattr(line.args, flag)
    return wanted in _texts(value) if equals else bool(value)


def _described(choice: str, options: dict[str, str]) -> str:
    if choice in ("gpu", "cpu"):
        return "a CUDA device" if choice == "gpu" else "a run on a CPU"
    if choice.startswith("package:"):
        return f"the package {choice.removeprefix('package:')}"
    if choice in NOT_A_FLAG:
        return NOT_A_FLAG[choice]
    flag, _, wanted = choice.partition("=")
    if wanted in ("None", "False"):
        return f"a run without {options[flag]}"
    return f"{options[flag]} {wanted}".strip()


def _fix(subject: str, choices: list[str], options: dict[str, str]) -> str:
    drop = f"drop {subject}"
    if choices[0].startswith("package:"):
        package = choices[0].removeprefix("package:")
        return f"pip install {PIP_NAMES.get(package, package)}, or {drop}"
    addable = [c for c in choices if c not in ("gpu", "cpu") and c not in NOT_A_FLAG]
    if addable and not addable[0].endswith(("=None", "=False")):
        return f"pass {_described(addable[0], options)} as well, or {drop}"
    return f"{drop}, or run on a GPU" if "gpu" in choices else drop


def _texts(value: Any) -> list[str]:
    """The value, or each of a list, as on the command line."""
    values = value if isinstance(value, list | tuple) else [value]
    return [one.name if isinstance(one, Enum) else str(one) for one in values]


def _command(as_written: str, value: Any) -> str:
    return as_written if isinstance(value, bool) else " ".join([as_written, *_texts(value)])
