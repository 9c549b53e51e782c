"""megatron's refusals as errors of ours.

Its parser answers a misspelt flag with 1,500 lines of usage, and its argument check is made of
assertions, many without a text.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import linecache
import re
import textwrap
import traceback
from collections.abc import Iterator
from difflib import get_close_matches
from typing import NoReturn

from qwen35_mcore.errors import ConfigError, Qwen35Error

_UNKNOWN = "unrecognized arguments: "


def raise_instead_of_usage(parser: argparse.ArgumentParser) -> None:
    """Let a parser raise ConfigError where it would print its usage and exit."""

    def error(message: str) -> NoReturn:
        if message.startswith(_UNKNOWN):
            raise _unknown_flags(
                message.removeprefix(_UNKNOWN), list(parser._option_string_actions)
            )
        raise ConfigError(f"cannot read the command line: {message}")

    parser.error = error  # type: ignore[method-assign]


def _unknown_flags(text: str, known: list[str]) -> ConfigError:
    flags = [word.partition("=")[0] for word in text.split() if word.startswith("--")]
    near = [match for flag in flags for match in get_close_matches(flag, known, n=3, cutoff=0.7)]
    return ConfigError(
        "there is no such flag" if flags else "a value follows no flag that takes it",
        got=text,
        fix=f"did you mean {' or '.join(near)}?" if near else "--help lists every flag",
    )


@contextlib.contextmanager
def as_config_errors(args: argparse.Namespace) -> Iterator[None]:
    """Turn what megatron raises about its arguments into a ConfigError with the values at hand."""
    try:
        yield
    except (AssertionError, ValueError, RuntimeError, OSError) as error:
        condition = _failed_assertion(error)
        text = " ".join(str(error).split()) or condition
        names = dict.fromkeys(re.findall(r"\bargs\.(\w+)", condition))
        values = [f"{name}={getattr(args, name)!r}" for name in names if hasattr(args, name)]
        raise ConfigError(
            f"megatron refuses these arguments: {text}",
            got=", ".join(values) or None,
            allowed=condition if condition != text else None,
        ) from error


def _failed_assertion(error: BaseException) -> str:
    """The condition of the assertion that failed, as source text; empty for other exceptions."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not isinstance(error, AssertionError) or frame.lineno is None:
        return ""
    last = (frame.end_lineno or frame.lineno) + 1
    lines = [linecache.getline(frame.filename, number) for number in range(frame.lineno, last)]
    try:
        (statement,) = ast.parse(textwrap.dedent("".join(lines))).body
    except (SyntaxError, ValueError):
        return ""
    return ast.unparse(statement.test) if isinstance(statement, ast.Assert) else ""


@contextlib.contextmanager
def as_first_raised() -> Iterator[None]:
    """Raise an error of ours as it was: megatron raises it anew in every module around, made of its
    text and the module's name, which then stands behind the fix."""
    try:
        yield
    except Qwen35Error as error:
        first = error
        while isinstance(context := first.__context__, Qwen35Error) and str(first).startswith(
            str(context)
        ):
            first = context
        raise first from first.__cause__
