"""A training run: `pretrain` with its datasets, forward step and loss, its flags, the checks before
it starts, and how its errors end it.

Imports everything below it; `checks` holds what is decided before the first step.
"""
