"""What a row of the table of flags says.

Every flag of megatron's parser, named by its destination, belongs to one class. A flag at its
default says nothing; any other value is free or refused, as its rows say.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """The class of a flag."""

    DECIDED = "decided by the model"
    FREE = "free"
    NO_EFFECT = "without effect here"
    UNSUPPORTED = "not supported"


@dataclass(frozen=True)
class Row:
    """Flags of one class.

    Args:
        why: the reason of a refusal, as the end of a sentence; of free flags: what shows that they
            work.
        flags: destinations in megatron's namespace.
        values: the values that the row is for; empty for the row that classes the flag.
        needs: what a free flag works beside: terms that all have to hold, each of them alternatives
            between bars. An alternative is ``gpu``, ``cpu``, ``package:NAME`` (importable), a flag
            that is set, or ``FLAG=VALUE``.
        fix: the next step after a refusal.
    """

    kind: Kind
    why: str
    flags: tuple[str, ...]
    values: tuple[str, ...] = ()
    needs: str = ""
    fix: str = "drop the flag"


def decided(why: str, flags: str, **more: str) -> Row:
    return _row(Kind.DECIDED, why, flags, **more)


def free(why: str, flags: str, **more: str) -> Row:
    return _row(Kind.FREE, why, flags, **more)


def no_effect(why: str, flags: str, **more: str) -> Row:
    return _row(Kind.NO_EFFECT, why, flags, **more)


def unsupported(why: str, flags: str, **more: str) -> Row:
    return _row(Kind.UNSUPPORTED, why, flags, **more)


def _row(kind: Kind, why: str, flags: str, *, values: str = "", **more: str) -> Row:
    return Row(kind, why, tuple(flags.split()), tuple(values.split()), **more)
