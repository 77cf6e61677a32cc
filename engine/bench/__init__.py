"""Measures: tokens a second and how near they are to the limit, kernels, cache replays, and the same on other programs."""
