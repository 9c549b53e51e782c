"""What a pipeline rank does in a step: passes, and the transfers that it asks and waits for.

Read from megatron-core 0.19.2, `pipeline_parallel/schedules.py`, with the settings that Megatron's
command line gives (outputs are freed once sent; no `--overlap-p2p-communication-warmup-flush`).
These waits decide when a rank stands still: without overlap it waits for every transfer, and with
overlap still for what it sends forward, because Megatron frees an output once it is sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

from qwen35_mcore.planner.schedule import Operation, Shape, passes, warmup_forwards


class Transfer(IntEnum):
    """A rank's part in a transfer: activations go to the next rank, gradients to the previous."""

    SEND_NEXT = 0
    RECV_PREV = 1
    SEND_PREV = 2
    RECV_NEXT = 3


SEND_NEXT, RECV_PREV, SEND_PREV, RECV_NEXT = Transfer
COUNTERPART = ((1, RECV_PREV), (-1, SEND_NEXT), (-1, RECV_NEXT), (1, SEND_PREV))
"""By Transfer: how far away the other rank is, and its part in the same transfer."""


class Ask(NamedTuple):
    """The rank asks for a transfer, its number-th of that kind, and goes on."""

    transfer: Transfer
    number: int


class Wait(NamedTuple):
    """The rank waits until a transfer that it asked for is done."""

    transfer: Transfer
    number: int


Action = Operation | Ask | Wait


def rank_actions(shape: Shape, rank: int) -> list[Action]:
    """Everything that a rank does in a step, in order."""
    return (_Interleaved if shape.vpp > 1 else _Plain)(shape, rank).actions


class _Rank(ABC):
    """Notes what a rank does."""

    def __init__(self, shape: Shape, rank: int) -> None:
        self.shape = shape
        self.first, self.last = rank == 0, rank == shape.pp - 1
        self.forward, self.backward = passes(shape, rank)
        self.total, self.warmup = len(self.forward), warmup_forwards(shape, rank)
        self.actions: list[Action] = []
        self._asked = [0] * len(Transfer)
        self._note()

    @abstractmethod
    def _note(self) -> None:
        """Note every action of the step."""

    def run(self, operation: Operation) -> None:
        self.actions.append(operation)

    def ask(self, transfer: Transfer) -> Wait:
        number = self._asked[transfer]
        self._asked[transfer] += 1
        self.actions.append(Ask(transfer, number))
        return Wait(transfer, number)

    def exchange(self, wanted: Iterable[tuple[Transfer, bool]]) -> None:
        """Asks for transfers, together, and waits for all of them."""
        self.actions.extend([self.ask(transfer) for transfer, is_wanted in wanted if is_wanted])


class _Plain(_Rank):
    """1F1B."""

    def _note(self) -> None:
        pairs = self.total - self.warmup
        for turn in range(self.warmup):
            self.exchange([(RECV_PREV, not self.first)])
            self.run(self.forward[turn])
            self.exchange([(SEND_NEXT, not self.last)])
        if pairs:
            self.exchange([(RECV_PREV, not self.first)])
        for pair in range(pairs):
            self.run(self.forward[self.warmup + pair])
            self.exchange([(SEND_NEXT, not self.last), (RECV_NEXT, not self.last)])
            self.run(self.backward[pair])
            more = not self.first and pair < pairs - 1
            self.exchange([(SEND_PREV, not self.first), (RECV_PREV, more)])
        for turn in range(pairs, self.total):
            self.exchange([(RECV_NEXT, not self.last)])
            self.run(self.backward[turn])
            self.exchange([(SEND_PREV, not self.first)])


class _Interleaved(_Rank):
    """Interleaved 1F1B."""

    def _note(self) -> None:
        self.inputs: list[Wait] = []
        self.gradients: list[Wait] = []
        self.sent_gradient: Wait | None = None
        self.exchange([(RECV_PREV, not self.first)])
        for turn in range(self.warmup):
            self._warmup(turn)
        for pair in range(self.total - self.warmup):
            (self._overlapped_pair if self.shape.overlap else self._pair)(pair)
        self._cooldown()

    def _warmup(self, turn: int) -> None:
        self.run(self.forward[turn])
        pairs_follow = turn == self.warmup - 1 and self.warmup < self.total
        gradient = pairs_follow and not self.last
        self.exchange(
            [
                (SEND_NEXT, self._sends_output(turn)),
                (RECV_PREV, self._gets_input(turn)),
                (RECV_NEXT, gradient and not self.shape.overlap),
            ]
        )
        if gradient and self.shape.overlap:
            self.gradients.append(self.ask(RECV_NEXT))

    def _pair(self, pair: int) -> None:
        turn = self.warmup + pair
        self.run(self.forward[turn])
        self.run(self.backward[pair])
        self.exchange(
            [
                (SEND_NEXT, self._sends_output(turn)),
                (SEND_PREV, self._sends_gradient(pair)),
                (RECV_PREV, self._gets_input(turn)),
                (RECV_NEXT, self._gets_gradient(pair)),
            ]
        )

    def _overlapped_pair(self, pair: int) -> None:
        turn = self.warmup + pair
        if self.inputs and self.forward[turn].stage > 0:
            self.actions.append(self.inputs.pop(0))
        self.run(self.forward[turn])
        sent = self.ask(SEND_NEXT) if self._sends_output(turn) else None
        if self._gets_input(turn):
            self.inputs.append(self.ask(RECV_PREV))
        if sent:
            self.actions.append(sent)
        self._await_gradient(pair)
        self.run(self.backward[pair])
        before = self.sent_gradient
        self.sent_gradient = self.ask(SEND_PREV) if self._sends_gradient(pair) else None
        if self._gets_gradient(pair):
            self.gradients.append(self.ask(RECV_NEXT))
        if before:
            self.actions.append(before)

    def _cooldown(self) -> None:
        pairs = self.total - self.warmup
        if not pairs:
            self.exchange([(RECV_NEXT, not self.last)])
        for turn in range(pairs, self.total):
            self._await_gradient(turn)
            self.run(self.backward[turn])
            gets = self._gets_gradient(turn) and turn < self.total - 1
            self.exchange([(SEND_PREV, self._sends_gradient(turn)), (RECV_NEXT, gets)])
        if self.sent_gradient:
            self.actions.append(self.sent_gradient)

    def _await_gradient(self, turn: int) -> None:
        if self.gradients and self.backward[turn].stage < self.shape.stages - 1:
            self.actions.append(self.gradients.pop(0))

    def _sends_output(self, turn: int) -> bool:
        return self.forward[turn].stage < self.shape.stages - 1

    def _sends_gradient(self, turn: int) -> bool:
        return self.backward[turn].stage > 0

    def _gets_input(self, turn: int) -> bool:
        """Whether the previous rank sends while this one runs a turn. The last rank, which sends to
        the first, is pp - 1 turns behind it, and its last chunk has no next."""
        if turn == self.total - 1:
            return False
        sender = turn - (self.shape.pp - 1)
        return not self.first or (
            sender >= 0 and self.forward[sender].stage // self.shape.pp < self.shape.vpp - 1
        )

    def _gets_gradient(self, turn: int) -> bool:
        """The same for gradients, which the first rank sends to the last."""
        sender = turn - (self.shape.pp - 1)
        return not self.last or (sender >= 0 and self.backward[sender].stage >= self.shape.pp)
