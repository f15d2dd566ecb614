"""Generation with a cache that stores less."""
