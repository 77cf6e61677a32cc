"""Measures: tokens a second, how near they are to the limit, kernels, cache replays, and other programs on the same."""
