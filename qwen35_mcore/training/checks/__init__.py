"""What flags, files and checkpoints decide about a run before any process group forms."""
