"""Fault tolerance takes the arguments of the run, where megatron parses ``sys.argv`` again."""

from __future__ import annotations

import inspect
from argparse import Namespace
from typing import Any

from megatron.training import ft_integration, get_args

from qwen35_mcore.mcore.patches.patch import Patch
from qwen35_mcore.mcore.patches.verdict import Verdict


class _ParsedAlready:
    """megatron's ``arguments`` module, whose parser gives what was parsed and checked before."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:
        parsed: Namespace = get_args()
        return parsed


def _probe() -> Verdict:
    """A call would parse the command line of this process, so the text is read."""
    text = inspect.getsource(ft_integration.setup)
    return Verdict.FAULT if "arguments.parse_args(" in text else Verdict.UNKNOWN


PATCH = Patch(
    name="arguments parsed once",
    target="megatron.training.ft_integration:arguments",
    why="fault tolerance, also where it is off, parses the command line again with a parser that "
    "refuses the values that this package adds to megatron's flags",
    replace=_ParsedAlready,
    probe=_probe,
)
