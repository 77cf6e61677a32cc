"""Measures: tok/s tables, limits, cache replay, plans."""
