"""The three answers of a probe."""

from __future__ import annotations

from enum import StrEnum


class Verdict(StrEnum):
    """What a probe finds on the installed release."""

    FAULT = "the fault is there"
    NO_FAULT = "the fault is not there"
    UNKNOWN = "cannot tell"


def shows(fault: bool) -> Verdict:
    """The verdict of a probe that saw, or did not see, the fault."""
    return Verdict.FAULT if fault else Verdict.NO_FAULT
