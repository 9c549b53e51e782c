"""Faults of megatron-core that this package patches, one file for each; `table.PATCHES` lists them.

May import megatron-core and what lies in `mcore`.
"""
