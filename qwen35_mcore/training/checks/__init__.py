"""What flags, files and checkpoints decide about a run before any process group forms.

`run` calls the checks in order. Imports what is below `training`, and of `training` only `choices`,
`flags` and `image_flags`.
"""
