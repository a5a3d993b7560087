"""The loop and its surroundings: set-up, reference pass, checkpoints, metrics, health."""
