"""The model's description: fields, checks, config.json, published sizes, widths, counts and FLOPs.

A new architecture field starts in `fields`. Imports the standard library and `errors` only (rich
where a table is printed).
"""
