"""The table of flags as text."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from qwen35_mcore.errors import ConfigError
from qwen35_mcore.training.flags.rows import Kind, Row
from qwen35_mcore.training.flags.table import GROUPS, TABLE, class_of, counts, destination


def overview() -> list[str]:
    """How many flags each class has, in all and by groups."""
    width = max(map(len, GROUPS)) + 2
    header = "".join(f"{kind.value:>22}" for kind in Kind)
    lines = [" " * width + header]
    for group, rows in GROUPS.items():
        flags = {flag for row in rows for flag in row.flags}
        kinds = [class_of(flag).kind for flag in flags]
        lines.append(f"{group:<{width}}" + "".join(f"{kinds.count(kind):>22}" for kind in Kind))
    return [*lines, f"{'all':<{width}}" + "".join(f"{n:>22}" for n in counts().values())]


def described(names: Iterable[str]) -> list[str]:
    """Class and reason of each flag, written as on the command line or as in megatron's namespace.

    Raises:
        ConfigError: no such flag.
    """
    return [line for name in names for line in _described(_destination(name))]


def _destination(name: str) -> str:
    flag = destination(name)
    if flag is not None:
        return flag
    near = get_close_matches(name.removeprefix("--").replace("-", "_"), TABLE, n=3)
    raise ConfigError(
        "the table has no such flag",
        got=name,
        allowed="the name that --help of the training script shows in capitals, or the flag",
        fix=f"did you mean {' or '.join(near)}?" if near else "`qwen35 flags` lists the groups",
    )


def _described(flag: str) -> Iterable[str]:
    group = next(name for name, rows in GROUPS.items() if any(flag in r.flags for r in rows))
    yield f"{flag} ({group})"
    for row in sorted(TABLE[flag], key=lambda row: bool(row.values)):
        yield "  " + _one_row(row)


def _one_row(row: Row) -> str:
    values = f"{' or '.join(row.values)}: " if row.values else ""
    needs = f"; needs {', '.join(row.needs.split()).replace('|', ' or ')}" if row.needs else ""
    fix = "" if row.kind is Kind.FREE else f"; {row.fix}"
    return f"{values}{row.kind.value}: {row.why}{needs}{fix}"
