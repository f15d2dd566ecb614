"""A cache that stores less of each token, and fewer tokens: channels of keys, bits of values and a budget of tokens compose."""
