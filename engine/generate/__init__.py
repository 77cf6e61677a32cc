"""Makes text: sequences, sampling, slots, and the loop that runs the model."""
