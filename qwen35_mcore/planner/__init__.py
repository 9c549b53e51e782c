"""Which parallel layout to use, and where memory and time go: `qwen35 plan`. README.md is its map.

Imports the standard library, `errors`, `config` and `parallel`; rich and matplotlib only to print.
"""
