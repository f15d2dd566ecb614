"""PEER (arXiv 2407.04153): a feed-forward layer that looks up single-neuron experts by product keys."""
