"""The reference's log-probs: the cache, and the pass that fills it."""
