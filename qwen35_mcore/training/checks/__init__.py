"""What flags, files and checkpoints decide about a run before any process group forms.

`run` calls the checks in order. Imports `config`, `parallel`, `data` and `mcore`.
"""
