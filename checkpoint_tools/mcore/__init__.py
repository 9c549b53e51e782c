"""The Megatron side: read and write ``torch_dist`` checkpoints without Megatron or processes.

`exported` shows such a checkpoint as the Hugging Face tensors that an export writes.
Imports `table` and `files`, never `hf` and never megatron.
"""
