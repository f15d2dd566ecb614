"""Recurrent mixers: minGRU and minLSTM (arXiv 2410.01201), the GRU as their yardstick, and their cache layer."""
