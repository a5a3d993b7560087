"""Model files to tensors and back: sources, formats, the quantised copy, adapters."""
