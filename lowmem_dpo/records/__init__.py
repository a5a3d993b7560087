"""What a run leaves: its folder, checkpoints, plots, and lines for experiment trackers."""
