"""The modules of a layer that replace or extend megatron-core's own.

Imports `config.shapes`, `kernels`, `mcore.imports` and, of `model`, only `transformer_config`.
"""
