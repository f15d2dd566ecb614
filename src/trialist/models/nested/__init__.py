"""Models whose linear layers hold nested codes: one set of weights that can be read at several precisions."""
