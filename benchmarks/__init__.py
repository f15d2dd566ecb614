"""Ours against peers on the same work, interleaved in one process: `python -m benchmarks` writes RESULTS.md."""
