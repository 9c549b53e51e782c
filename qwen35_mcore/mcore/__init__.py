"""Everything that depends on megatron-core's release: its names, patches, CPU mode, files, errors.

No other package of qwen35_mcore or checkpoint_tools imports megatron; tests do. May import torch,
`errors`, `process` and `versions`. What to do when megatron-core has a new release:
README.md beside this file.
"""
