"""Everything that depends on megatron-core's release: its names, patches, CPU mode, files, errors.

No other package of qwen35_mcore or checkpoint_tools imports megatron; tests do. May import torch,
Transformer Engine, `errors`, `process` and `versions`. README.md beside this file says how to move
to a new release.
"""
