"""Who computes a GatedDeltaNet: reference mathematics, FLA, fused Triton kernels, and the choice.

`reference` is the specification, `base` the interface; a new choice is one file that registers
itself. Imports torch and `errors`; FLA and Triton only when kernels are built.
"""
