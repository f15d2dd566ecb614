"""Budget forcing (s1): minimum and maximum of thinking."""
