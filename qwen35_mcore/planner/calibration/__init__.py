"""What was measured of layers and runs, one JSON file a GPU, and its reader.

Imports `config`, `planner.hardware` and `planner.choices` only.
"""
