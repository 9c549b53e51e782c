"""Which Hugging Face tensors are which Megatron tensors, and how one becomes the other.

`names` has the rows, `transforms` the boxes that rows copy, `explain` a row in words.
Imports torch, `qwen35_mcore.config` and `qwen35_mcore.errors`; nothing else of this package.
"""
