"""What this package replaces in megatron-core, one file a patch.

Imports megatron-core and `mcore`.
"""
