"""Model files: GGUF on disk, and made-up models of a published shape."""

from engine.gguf.model_file import ModelFile, TensorInfo
from engine.gguf.reader import GGUFFile
from engine.gguf.weights import WeightMemory

__all__ = ["GGUFFile", "ModelFile", "TensorInfo", "WeightMemory"]
