"""The modules of a layer that replace or extend megatron-core's own.

Imports `kernels`, `mcore.imports` and, of `model`, only `transformer_config`.
"""
