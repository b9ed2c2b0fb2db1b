"""Benchmarks: they print ratios and write JSON; they never assert a time."""
