"""Settings: groups of fields, a config a verb, from words and YAML and back."""
