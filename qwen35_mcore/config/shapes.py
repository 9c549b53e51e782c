"""Heads and widths (in channels) of a token mixer's projections: the one place that computes them.

A shape describes the layer of the whole model, or the part of it that one rank holds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class GdnShape:
    """A GatedDeltaNet: its input projection is ``[..., q | k | v | z | b | a]``."""

    key_heads: int
    """Heads of q, and of k."""
    value_heads: int
    """Heads of v, of the output gate z, and of the logits b and a (one channel a head)."""
    key_head_dim: int
    value_head_dim: int
    gates_apart: bool = False
    """The logits b and a come from a projection of their own: the input projection ends with z."""

    @property
    def key_width(self) -> int:
        """Channels of q, and of k."""
        return self.key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        """Channels of v, of z, and of the output projection's input."""
        return self.value_heads * self.value_head_dim

    @property
    def qkv_heads(self) -> int:
        """Heads of q, k and v together."""
        return 2 * self.key_heads + self.value_heads

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """Channels of q, k and v."""
        return self.key_width, self.key_width, self.value_width

    @property
    def conv_width(self) -> int:
        """Channels of the convolution: q, k and v together."""
        return sum(self.qkv_widths)

    @property
    def qkvz_width(self) -> int:
        """Channels of the input projection without the logits b and a."""
        return self.conv_width + self.value_width

    @property
    def in_proj_widths(self) -> tuple[int, int, int, int]:
        """Channels of the input projection: of q, k and v together, of z, of b and of a."""
        logits = 0 if self.gates_apart else self.value_heads
        return self.conv_width, self.value_width, logits, logits

    @property
    def in_proj_width(self) -> int:
        """Channels of the input projection."""
        return sum(self.in_proj_widths)

    def split(self, ranks: int) -> GdnShape:
        """The part of one of ``ranks`` ranks that share the heads evenly."""
        return replace(
            self, key_heads=self.key_heads // ranks, value_heads=self.value_heads // ranks
        )


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Full attention with an output gate."""

    heads: int
    """Query heads, each with an output gate of the same width."""
    kv_heads: int
    """Heads of the key, and of the value."""
    head_dim: int

    @property
    def query_width(self) -> int:
        """Channels of the query, of its gate, and of the output projection's input."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Channels of the key, and of the value."""
        return self.kv_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Channels of the input projection: query, gate, key and value."""
        return 2 * self.query_width + 2 * self.kv_width
