"""Errors a user can act on: what is wrong, the value given, what is allowed, what to do next."""

from __future__ import annotations


class Qwen35Error(Exception):
    """Base of every error that is the user's to fix. Command lines print it alone and exit 2.

    Args:
        what: one sentence naming the thing that is wrong.
        got: the offending value, shown with ``repr`` unless it is a string already.
        allowed: what would have been accepted.
        fix: the next step, as an instruction.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object | None = None,
        allowed: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.got, self.allowed, self.fix = what, got, allowed, fix
        parts = [what]
        if got is not None:
            parts.append(f"got: {got if isinstance(got, str) else repr(got)}")
        if allowed:
            parts.append(f"allowed: {allowed}")
        if fix:
            parts.append(f"fix: {fix}")
        super().__init__("\n  ".join(parts))


class ConfigError(Qwen35Error):
    """A model config, flavor, layout or flag that cannot describe a runnable model."""


class PlanError(Qwen35Error):
    """No parallel layout satisfies what was asked."""


class CheckpointError(Qwen35Error):
    """A checkpoint that is incomplete, inconsistent, or of another architecture."""


class DataError(Qwen35Error):
    """Input text, tokenizer or dataset files that cannot be read or used together."""


class KernelError(Qwen35Error):
    """Named kernels, or the modules of a named spec provider, cannot run here."""
