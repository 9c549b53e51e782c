"""A whole step as a list that is evaluated from front to back, whatever the passes take.

A transfer begins when both ranks have asked for it, as NCCL's do, and is done ``p2p_s`` later. So
every moment of a step is the largest of earlier moments plus a duration; which moments those are is
worked out once per shape and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from qwen35_mcore.planner.schedule import Operation, Shape
from qwen35_mcore.planner.transfers import COUNTERPART, Ask, Transfer, rank_actions

Step = tuple[int, int, int, int, int]


class Program(NamedTuple):
    """The moments of a step after moment 0, its begin."""

    steps: tuple[Step, ...]
    """(previous, asked, asked, asked, code): the moment comes code's duration after the later of
    the rank's previous moment and, where the rank waits for transfers, p2p_s after the last of the
    moments at which either side asked for them (the first is 0 where it waits for none). Code is
    the virtual stage of a forward pass, the number of stages plus that of a backward pass, and
    twice the number of stages for no pass."""
    passes: tuple[tuple[int, int, int], ...]
    """(moment, rank, microbatch) of the end of every pass."""


@lru_cache(maxsize=64)
def program(shape: Shape) -> Program:
    """The program of a schedule."""
    ranks = [_Rank(shape, rank) for rank in range(shape.pp)]
    steps: list[Step] = []
    passes: list[tuple[int, int, int]] = []
    left = -1
    while left:
        for rank in ranks:
            rank.advance(ranks, steps, passes)
        before, left = left, sum(len(rank.actions) for rank in ranks)
        assert left != before, "the ranks wait for each other"
    return Program(tuple(steps), tuple(passes))


class _Rank:
    """How far a rank has come."""

    def __init__(self, shape: Shape, rank: int) -> None:
        self.shape, self.rank = shape, rank
        self.actions = rank_actions(shape, rank)[::-1]
        self.now = 0
        self.asked: tuple[list[int], ...] = tuple([] for _ in Transfer)
        self.awaited: dict[int, int] = {}
        """By rank, the last of the moments at which it asked for what this one waits for."""

    def advance(
        self, ranks: Sequence[_Rank], steps: list[Step], passes: list[tuple[int, int, int]]
    ) -> None:
        """Until the actions end or another rank has to ask first."""
        no_pass = 2 * self.shape.stages
        while self.actions:
            action = self.actions[-1]
            if isinstance(action, Operation):
                kind, stage, microbatch = action
                self._step(steps, stage if kind == "F" else stage + self.shape.stages)
                passes.append((self.now, self.rank, microbatch))
            elif isinstance(action, Ask):
                if self.awaited:
                    self._step(steps, no_pass)
                self.asked[action.transfer].append(self.now)
            elif not self._wait(action.transfer, action.number, ranks):
                return
            self.actions.pop()
        if self.awaited:
            self._step(steps, no_pass)

    def _wait(self, transfer: Transfer, number: int, ranks: Sequence[_Rank]) -> bool:
        distance, part = COUNTERPART[transfer]
        other = ranks[(self.rank + distance) % self.shape.pp]
        if len(other.asked[part]) <= number:
            return False
        for rank, moment in (
            (other.rank, other.asked[part][number]),
            (self.rank, self.asked[transfer][number]),
        ):
            self.awaited[rank] = max(moment, self.awaited.get(rank, 0))
        return True

    def _step(self, steps: list[Step], code: int) -> None:
        # at most this rank and its two neighbours; the last moment first
        asked = sorted(self.awaited.values(), reverse=True)
        first, second, third = (*asked, 0, 0, 0)[:3]
        steps.append((self.now, first, second, third, code))
        self.awaited.clear()
        self.now = len(steps)
