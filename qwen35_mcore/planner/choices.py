"""The words that a plan chooses among."""

from __future__ import annotations

PRECISIONS = ("bf16", "fp8-blockwise", "fp8-tensorwise")
RECOMPUTE = ("none", "selective", "full")
