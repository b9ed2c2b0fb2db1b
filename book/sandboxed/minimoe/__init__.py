"""Stands for minimoe where a submission runs: `from minimoe import check` works, and nothing else is here."""
