"""How far gradients were off, as the worker that imports torch tells the process that does not."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Quantity:
    """Relative error of an output or gradient; NaN where it is not finite."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """A NaN is not."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class GradientCheck:
    """What was checked, and how far every quantity was off."""

    kernels: str
    dtype: str
    seconds: float
    quantities: tuple[Quantity, ...]

    @property
    def ok(self) -> bool:
        """Whether every quantity is within what is allowed."""
        return all(quantity.ok for quantity in self.quantities)

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` undoes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GradientCheck:
        """Undo `to_json`."""
        quantities = tuple(Quantity(**quantity) for quantity in data["quantities"])
        return cls(**data | {"quantities": quantities})
