"""Modules that replace or extend megatron-core's own."""
