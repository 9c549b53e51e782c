"""Conversations with images: jsonl to Energon's WebDataset, and its samples to microbatches.

Importing this package loads neither torch nor transformers nor Energon; its modules load what they
need when they run.
"""
