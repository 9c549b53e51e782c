"""The parts that a GatedDeltaNet's projection is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Heads:
    """Head counts and sizes of one rank's projection ``[..., q | k | v | z | b | a]``."""

    key: int
    value: int
    key_size: int
    value_size: int
    gates_apart: bool = False
    """The logits b and a come from a projection of their own: ``[..., q | k | v | z]`` here."""

    @property
    def mixed(self) -> int:
        """Heads of q, k and v together."""
        return 2 * self.key + self.value

    @property
    def convolved(self) -> tuple[int, int, int]:
        """Channels of q, k and v, which the convolution runs over."""
        keys = self.key * self.key_size
        return keys, keys, self.value * self.value_size

    @property
    def sections(self) -> tuple[int, int, int, int]:
        """Channels of q, k and v together, of z, of b and of a."""
        gates = 0 if self.gates_apart else self.value
        return sum(self.convolved), self.value * self.value_size, gates, gates
