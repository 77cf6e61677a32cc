"""Measures: tokens a second and how near they are to the limit, kernels, and the same on other programs."""
