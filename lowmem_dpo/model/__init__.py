"""The model: where it comes from, how it is stored, its adapter, how it is run and scored."""
