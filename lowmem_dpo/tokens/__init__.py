"""From preferences to token ids: templates, answers, pairs that fit."""
