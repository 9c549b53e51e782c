"""Everything that depends on megatron-core's release: imports, patches, CPU mode, files, errors.

Imports megatron-core and torch; of this package only `errors`, `process` and `versions`.
"""
