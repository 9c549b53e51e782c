"""megatron's refusals as errors of ours.

Its parser answers a misspelt flag with 1,500 lines of usage, and its argument check is made of
assertions, many without a text.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import inspect
import linecache
import re
import textwrap
import traceback
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from typing import Any, NoReturn

from qwen35_mcore.errors import ConfigError, Qwen35Error

_UNKNOWN = "unrecognized arguments: "
_HELP = "--help says what every flag takes"


def raise_instead_of_usage(parser: argparse.ArgumentParser) -> None:
    """Let a parser raise ConfigError where it would print its usage and exit."""

    def error(message: str) -> NoReturn:
        if message.startswith(_UNKNOWN):
            raise _unknown_flags(
                message.removeprefix(_UNKNOWN), list(parser._option_string_actions)
            )
        raise ConfigError(f"cannot read the command line: {message}", fix=_HELP)

    parser.error = error  # type: ignore[method-assign]
    for action in parser._actions:
        if inspect.isfunction(action.type):
            action.type = _refusing(action.type)


def _refusing(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """megatron's reader of a value, which may crash at one, as a reader that refuses it."""

    @functools.wraps(read)
    def refuse(text: str) -> Any:
        try:
            return read(text)
        except argparse.ArgumentTypeError:
            raise
        except Exception as error:
            raise argparse.ArgumentTypeError(f"invalid value: {text!r}") from error

    return refuse


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
    except Qwen35Error:
        raise
    except Exception as error:
        condition = failed_assertion(error)
        text = " ".join(str(error).split()) or condition
        if not isinstance(error, (AssertionError, ValueError, RuntimeError, OSError)):
            text = f"{type(error).__name__}: {text}"
        raise ConfigError(
            f"megatron refuses these arguments: {text}",
            got=named_values(args, condition),
            allowed=condition if condition != text else None,
        ) from error


def named_values(args: argparse.Namespace, text: str) -> str | None:
    """``name=value`` of every argument that a text names; None where it names none."""
    names = dict.fromkeys(re.findall(r"[a-z]\w+", text.replace("--", "").replace("-", "_")))
    values = [f"{name}={getattr(args, name)!r}" for name in names if hasattr(args, name)]
    return ", ".join(values) or None


def first_raised(error: BaseException) -> BaseException:
    """Megatron raises an error anew in every module around the one that failed, each time with the
    module's name behind the text: the first."""
    while (
        (context := error.__context__) is not None
        and type(context) is type(error)
        and str(error).startswith(str(context))
    ):
        error = context
    return error


def failed_assertion(error: BaseException) -> str:
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
    """Raise an error of ours as it was, without the names of modules behind its fix."""
    try:
        yield
    except Qwen35Error as error:
        first = first_raised(error)
        raise first from first.__cause__
