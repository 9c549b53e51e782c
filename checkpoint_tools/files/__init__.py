"""How a conversion's files are written, whatever is in them: manifest, checksums, progress.

What is killed goes on where it was, and what is not complete does not look complete.
Imports isal, rich, `qwen35_mcore.errors` and `qwen35_mcore.process`; nothing else of this package.
"""
