"""Frozen linear layers: dense or in NF4, with a LoRA adapter or without."""
