"""From a preference file to packs of token trees: formats, templates, trees, packing, preview."""
