"""What flags, files and checkpoints decide about a run before any process group forms.

`run` calls the checks in order. Imports `model.spec_providers`, `parallel`, `data`,
`mcore`, `config`, `process`, `errors` and, of `training`, `choices` and `flags`.
"""
