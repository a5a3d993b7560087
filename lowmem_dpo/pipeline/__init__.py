"""What stands around training: generation side by side, the demo."""
