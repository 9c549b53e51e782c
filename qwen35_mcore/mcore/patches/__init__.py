"""Faults of megatron-core that this package patches, one file a subject; all in `table`.

Imports torch, megatron-core, `mcore`, `errors` and `versions`; Transformer Engine where a patch
needs it.
"""
