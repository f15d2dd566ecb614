"""The precision of nested weights, fixed or falling from step to step."""
