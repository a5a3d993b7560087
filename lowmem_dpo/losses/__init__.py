"""Preference losses: pure functions of a batch of pairs' log-probs, and what is known of each."""
