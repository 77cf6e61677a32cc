"""Small model files, ways to damage them, and the check that no damage does more than raise an `EngineError`.

Used by `test_gguf_mutations.py` with a fixed choice of damages, and by `fuzz_gguf.py` for as long as one likes.
"""

from __future__ import annotations

import contextlib
import random
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from engine.devices.cpu import CPUDevice
from engine.devices.graph import KVType
from engine.devices.program import Limits
from engine.errors import EngineError, GGUFError
from engine.gguf.metadata import Metadata, Value
from engine.gguf.model_file import TensorInfo
from engine.gguf.reader import DEFAULT_ALIGNMENT, GGUFFile
from engine.gguf.recipes import RECIPES
from engine.gguf.weights import WeightMemory
from engine.gguf.writer import encode_head
from engine.models import Model, load_model
from engine.quants.formats import FORMATS
from engine.synthetic import SyntheticModel
from engine.synthetic.published import Published

_KEYS = {
    "context_length": 64,
    "embedding_length": 32,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "attention.key_length": 16,
    "attention.value_length": 16,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 1e4,
    "expert_count": 2,
    "expert_used_count": 1,
    "expert_feed_forward_length": 32,
}
_QWEN_3 = _KEYS | {"block_count": 1, "feed_forward_length": 96, "rope.dimension_count": 16}
_QWEN_35 = _KEYS | {
    "block_count": 4,
    "full_attention_interval": 4,
    "rope.dimension_count": 8,
    "rope.dimension_sections": (2, 1, 1, 0),
    "expert_shared_feed_forward_length": 32,
    "ssm.conv_kernel": 4,
    "ssm.group_count": 1,
    "ssm.inner_size": 32,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 2,
}
_TENSORS = "output.weight", "attn_q_norm.weight", "attn_k_norm.weight"
_QWEN3MOE = Published("qwen3moe", 40, _QWEN_3, _TENSORS)
_QWEN35MOE = Published("qwen35moe", 40, _QWEN_35, (*_TENSORS, "ffn_gate_inp_shexp.weight"))

INTERESTING = tuple(
    n + d
    for n in (0, 1 << 8, 1 << 16, 1 << 31, 1 << 32, 1 << 40, 1 << 48, 1 << 61, 1 << 63, 1 << 64)
    for d in (-1, 0, 1)
)
VALUES: tuple[Value, ...] = (
    *(n for n in INTERESTING if -1 <= n < 1 << 64),
    *(3, 7, 48, 1000, 100_000, -(1 << 31), -(1 << 63)),
    *(0.0, -1.0, 1e-30, 1e38, float("nan"), float("inf"), 1e300),
    *(True, False, "", "qwen3moe", "llama", "yarn", "\0", "x" * 1000),
    *([], ["a", ""], np.zeros(0, np.int32), np.arange(4, dtype=np.uint8), np.full(5, -1, np.int64)),
    *(np.array([1, 0, 1], bool), np.array([np.nan, 2], np.float32), np.full(3, 1 << 63, np.uint64)),
)


@dataclass(frozen=True)
class Parts:
    """A file taken apart; `encode` puts it together again, with zeros or any bytes for weights."""

    values: dict[str, Value]
    tensors: list[TensorInfo]

    @property
    def n_head_bytes(self) -> int:
        return len(encode_head(self.values, self.tensors))

    def encode(self, rng: random.Random | None = None) -> bytes:
        n_bytes = sum(-(-info.n_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT for info in self.tensors)
        n_bytes = min(n_bytes, 1 << 20)
        return encode_head(self.values, self.tensors) + (bytes(n_bytes) if rng is None else rng.randbytes(n_bytes))


def small_models() -> list[Parts]:
    """One of each architecture and some mixtures of formats, with a few tokens instead of a vocabulary."""
    models = []
    for published, recipe in ((_QWEN3MOE, "f16"), (_QWEN35MOE, "q8_0"), (_QWEN3MOE, "q4_k_m"), (_QWEN35MOE, "mxfp4")):
        model = SyntheticModel("small", published, RECIPES[recipe], 0)
        values = {key: model.metadata.value(key) for key in model.metadata}
        values["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(40)]
        values["tokenizer.ggml.token_type"] = np.ones(40, np.int32)
        values["tokenizer.ggml.merges"] = ["t 1", "t 2"]
        models.append(Parts(values, list(model.tensors.values())))
    return models


def parts_of(path: Path) -> Parts:
    """A model file taken apart."""
    with GGUFFile.open(path) as file:
        return Parts({key: file.metadata.value(key) for key in file.metadata}, list(file.tensors.values()))


def peer_models() -> list[Parts]:
    """Those of `tests/data/peers`: the other architectures."""
    peers = Path(__file__).resolve().parent / "data" / "peers"
    return [parts_of(path) for path in sorted(peers.glob("*-F32.gguf"))]


# -- damages ---------------------------------------------------------------------------------------------------------


def damage_parts(rng: random.Random, parts: Parts) -> Parts:
    """Change what the file says, in a way that keeps it well-formed: keys, values, names, shapes and types."""
    values, tensors = dict(parts.values), list(parts.tensors)
    for _ in range(rng.choice((1, 1, 2, 4))):
        match rng.randrange(8):
            case 0:
                values.pop(rng.choice(list(values)), None)
            case 1 | 2 | 3:
                values[rng.choice(list(values))] = rng.choice(VALUES)
            case 4:
                values[rng.choice(("general.alignment", "split.count", "split.no", "split.tensors.count"))] = (
                    rng.choice(VALUES)
                )
            case 5:
                tensors.pop(rng.randrange(len(tensors)))
            case 6:
                i = rng.randrange(len(tensors))
                shape = list(tensors[i].shape) or [1]
                change = rng.choice((0, 1, shape[0] + 1, 2 * shape[0], rng.choice(INTERESTING)))
                shape[rng.randrange(len(shape))] = change % (1 << 64)
                if rng.random() < 0.3:
                    shape = [*shape, 1] if rng.random() < 0.5 else shape[:-1]
                tensors[i] = replace(tensors[i], shape=tuple(shape))
            case 7:
                i = rng.randrange(len(tensors))
                name = rng.choice((tensors[i].name, rng.choice(tensors).name, tensors[i].name + ".scale", ""))
                tensors[i] = replace(tensors[i], name=name, format=rng.choice(FORMATS))
        if not tensors or not values:
            break
    return Parts(values, tensors)


def damage_bytes(rng: random.Random, data: bytes, n_head: int) -> bytes:
    """Damage bytes, mostly in the head of the file."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if len(out) < 16:
            break
        at = rng.randrange(min(n_head, len(out)) if rng.random() < 0.95 else len(out))
        match rng.randrange(8):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at] = rng.choice((0, 1, 8, 9, 12, 13, 127, 128, 255))
            case 2:
                out[at : at + 8] = struct.pack("<Q", rng.choice(INTERESTING) % (1 << 64))
            case 3:
                out[at : at + 4] = struct.pack("<I", rng.choice(INTERESTING) % (1 << 32))
            case 4:
                del out[at : at + rng.choice((1, 4, 8, 100))]
            case 5:
                out[at:at] = rng.randbytes(rng.choice((1, 4, 8, 100)))
            case 6:
                source = rng.randrange(len(out))
                out[at : at + 16] = out[source : source + 16]
            case 7:
                del out[at:]
    return bytes(out)


# -- the check -------------------------------------------------------------------------------------------------------


def exercise(path: Path) -> str:
    """Do everything with a file, a few steps of the forward pass included; return what became of it.

    Any exception but `EngineError` is a defect, and passes through.
    """
    try:
        file = GGUFFile.open(path)
    except EngineError as error:
        return _kind(error)
    with file:
        _read_metadata(file.metadata)
        try:
            model = load_model(file)
            _run(file, model)
            outcome = "ran"
        except EngineError as error:
            outcome = _kind(error)
        names, checks = tuple(file.tensors), []
        for mode in ("mmap", "memory"):
            with WeightMemory.load(file, names, mode, n_threads=1) as weights:
                checks.append([int(weights.array(name).sum()) for name in names])
        assert checks[0] == checks[1]
    return outcome


def _run(file: GGUFFile, model: Model) -> None:
    """Run some tokens, whatever bytes the weights are."""
    limits = Limits(max_tokens=4, n_slots=1, context_length=16, kv_type=KVType.F16)
    one = np.zeros(1, np.int32)
    with WeightMemory.load(file, model.tensor_names, "memory", n_threads=1) as weights:
        program = CPUDevice(1).compile(model.graph, weights, limits)
        logits = program.run(np.zeros(3, np.int32), np.arange(3, dtype=np.int32), np.zeros(3, np.int32), one)
        assert logits.shape == (1, model.spec.n_vocab)
        program.run(one, one + 3, one, one)
        ids, moe = program.routing(), model.spec.moe
        largest = moe.n_experts if moe.layer_experts_used else moe.n_experts - 1  # nobody, where a layer uses fewer
        assert ((ids >= 0) & (ids <= largest)).all()


def _kind(error: EngineError) -> str:
    message = str(error)
    assert message
    assert len(message) < 3000
    return type(error).__name__


def _read_metadata(metadata: Metadata) -> None:
    """Call every getter for every key: it answers or raises `GGUFError`."""
    for key in metadata:
        for getter in ("text", "integer", "number", "flag", "texts", "integers", "numbers", "flags"):
            with contextlib.suppress(GGUFError):
                getattr(metadata, getter)(key)
