"""The model as Megatron modules: configuration, layer specs, layers, and `build_model`.

Imports `config`, `parallel`, `kernels` and `mcore`; megatron-core only through `mcore.imports`.
"""
