"""What was measured of layers and runs, one JSON file a GPU, and its reader.

Imports `config`, `errors` and `planner.hardware` only.
"""
