"""How a model is spread over ranks: layouts, the rules they obey, and pipeline stages.

Imports the standard library, `config` and `errors` only.
"""
