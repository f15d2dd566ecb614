"""Recurrent depth (arXiv 2502.05171): the loop, its randomness, cache, exits, and conversion of existing models."""
