"""A run on disk: its inputs, warm-up, folder, lock, checkpoints, resuming, export."""
