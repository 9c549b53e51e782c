"""The model as Megatron modules: configuration, layer specs, layers, and `build_model`.

Imports torch, `config`, `parallel`, `kernels`, `mcore` and `errors`; megatron-core only through
`mcore`, Transformer Engine only where it builds the layers.
"""
