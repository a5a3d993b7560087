"""How much memory a run may use. The planner and weight streaming belong here."""
