"""Check this machine: versions, kernels and their gradients.

`supervise` runs `worker` in a process of its own, because a broken package may end that process.
The worker takes a `snapshot` of the machine, `rules` and `kernel_paths` judge it from these facts
alone, `gradient_check` runs the kernels, and `report` prints. Imports every package below it;
`snapshot`, `rules` and `supervise` import no torch.
"""
