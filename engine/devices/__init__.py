"""Devices: where memory lives and operations run. `graph` is what the rest of the engine sees of them."""
