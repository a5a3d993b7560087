"""An optimizer step: its gradient, again with less memory, its update, its rehearsal."""
