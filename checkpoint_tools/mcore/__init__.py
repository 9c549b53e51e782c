"""The Megatron side: read and write ``torch_dist`` checkpoints without Megatron or processes.

`exported` shows such a checkpoint as the Hugging Face tensors that an export writes.
Imports torch, `table`, `files` and, of `qwen35_mcore`, `config` and `errors`; never `hf` and never
megatron.
"""
