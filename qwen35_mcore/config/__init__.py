"""The model's description: fields, checks, config.json, published sizes, counts and FLOPs.

Imports the standard library and `qwen35_mcore.errors` only.
"""
