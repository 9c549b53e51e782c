"""The modules of a layer that replace or extend megatron-core's own.

Imports torch, `config.shapes`, `kernels`, `mcore`, `errors` and, of `model`, only
`transformer_config`.
"""
