"""The Hugging Face side: read a folder, decide what becomes of each tensor, write a folder.

Also what an import carries: tensors and files kept beside a checkpoint, unconverted.
Imports torch, safetensors, huggingface_hub, `table`, `files` and, of `qwen35_mcore`, `config`,
`data.tokenizer_files` and `errors`; never `mcore`.
"""
