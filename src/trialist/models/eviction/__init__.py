"""Eviction of keys and values under budgets of tokens: policies, cache, swap into existing models, calibration."""
