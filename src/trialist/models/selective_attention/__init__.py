"""Selective attention (arXiv 2410.02703): mixer, swap into existing models, caches, eviction of masked tokens."""
