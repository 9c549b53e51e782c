"""The Hugging Face side: read a folder, decide what becomes of each tensor, write a folder.

Also what an import carries: tensors and files kept beside a checkpoint, unconverted.
Imports `table` and `files`, never `mcore`.
"""
