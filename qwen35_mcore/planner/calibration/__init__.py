"""What was measured, one JSON file a GPU, and its reader. Imports `planner.hardware` only."""
