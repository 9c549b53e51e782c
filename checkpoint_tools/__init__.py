"""Convert Qwen3.5 checkpoints between Hugging Face and Megatron: exact, streamed, without a GPU.

The commands lie here. Below them are `hf` and `mcore`, the two sides; below those `table`, which
tensor becomes which, and `files`, how any result is written. Nothing here imports megatron.
"""
