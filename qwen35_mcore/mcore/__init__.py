"""Everything that depends on megatron-core's release: its names, patches, CPU mode, files, errors.

Nothing else in this repository imports megatron. May import torch, `errors`, `process` and
`versions`. What to do when megatron-core has a new release: README.md beside this file.
"""
