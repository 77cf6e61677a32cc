"""Runs mixture-of-experts models from GGUF files, hot experts in VRAM and cold ones on the CPU."""
