"""Kernels of a GatedDeltaNet (reference mathematics, FLA, fused Triton) and of the routed experts.

To add kernels of a GatedDeltaNet, write one module here named ``*_kernels`` with a subclass of
`base.Kernels` under `base.register`. It says where the kernels can run (`support`) and computes the
convolution, the delta rule and the gated norm; `registry` finds it, and ``--gdn-kernel`` takes its
name. To replace one operation alone, subclass `FlaKernels` or `TorchKernels` there.

`reference` is the specification. Imports torch, `config.shapes`, `errors` and `versions`; FLA,
Triton and Transformer Engine only when kernels are built.
"""
