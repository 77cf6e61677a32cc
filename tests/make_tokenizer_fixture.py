"""Makes files of `tests/data/tokenizers`: small vocabularies of kinds that the golden set lacks, and llama.cpp's ids.

Run by hand: `pip install llama-cpp-python gguf tokenizers`, then `python tests/make_tokenizer_fixture.py [NAME ...]`.
gemma4 is of the kind that Gemma 4 has; its merges are learned from this repository's own documents, over whole lines,
so that tokens go across words. phi-3 is `tiny-spm` under a name of that family, whose special tokens take the white
space behind them with them.
"""

from __future__ import annotations

import ctypes
import json
import random
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import gguf
import llama_cpp
import tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

HERE = Path(__file__).resolve().parent
OUT = HERE / "data" / "tokenizers"
N_TOKENS, MOST_LINE_ENDS, MOST_SPACES = 900, 4, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
SPECIAL = {
    "<pad>": CONTROL,
    "<eos>": CONTROL,
    "<bos>": CONTROL,
    "<unk>": UNKNOWN,
    "<|turn>": CONTROL,
    "<turn|>": CONTROL,
    "<|tool_response>": USER_DEFINED,
    "<|channel>": USER_DEFINED,
    "</s>": NORMAL,
}
PHI_SPECIAL = {"<|endoftext|>": CONTROL, "<|assistant|>": CONTROL, "<|end|>": CONTROL, "<|user|>": USER_DEFINED}
PARTS = (
    *("the expert", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "x" * 9, "<0x0A>"),
    *("\u00e9", "e\u0301", "\u65e5\u672c", "\U0001f680", "\u2581"),
)


def gemma() -> dict[str, object]:
    """A vocabulary, by the keys of a GGUF file."""
    lines = [
        line.replace(" ", "\u2581")
        for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
        for line in (HERE.parent / name).read_text(encoding="utf-8").splitlines()
    ]
    learned = tokenizers.Tokenizer(BPE())
    learned.train_from_iterator(lines, BpeTrainer(vocab_size=N_TOKENS, show_progress=False))
    model = json.loads(learned.to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    runs = [c * n for c, most in (("\n", MOST_LINE_ENDS), ("\u2581", MOST_SPACES)) for n in range(1, most + 1)]
    merges = [f"{run[:i]} {run[i:]}" for run in reversed(runs) for i in range(len(run) - 1, 0, -1)] + merges
    own = {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    kinds = SPECIAL | own | dict.fromkeys([*runs, *sorted(model["vocab"], key=model["vocab"].get)], NORMAL)
    return {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": list(kinds),
        "tokenizer.ggml.token_type": list(kinds.values()),
        "tokenizer.ggml.merges": list(dict.fromkeys(merges)),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
    }


def phi() -> dict[str, object]:
    values = json.loads((OUT / "tiny-spm.json").read_text(encoding="utf-8"))["metadata"]
    values["tokenizer.ggml.tokens"] += PHI_SPECIAL
    values["tokenizer.ggml.scores"] += [-1000.0] * len(PHI_SPECIAL)
    values["tokenizer.ggml.token_type"] += PHI_SPECIAL.values()
    del values["tokenizer.chat_template"]
    return values | {"general.name": "Tiny Phi-3.5 MoE"}


VOCABULARIES = {"gemma4": (gemma, SPECIAL), "phi-3": (phi, ["<unk>", "<s>", "</s>", *PHI_SPECIAL])}


def texts(special: Iterable[str]) -> list[str]:
    rng = random.Random(0)
    made = ["".join(rng.choices((*PARTS, *special), k=rng.randint(2, 9))) for _ in range(60)]
    lines = (HERE.parent / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()
    return [*made, *("\n" * n for n in range(1, 10)), *(" " * n for n in range(1, 8)), "\n".join(lines[2:12])]


def write_vocabulary(path: Path, values: dict[str, object]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def make(name: str) -> None:
    source, special = VOCABULARIES[name]
    values = source()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_vocabulary(path, values)
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
    assert model
    vocab = llama_cpp.llama_model_get_vocab(model)

    def ids(text: str, special: bool) -> list[int]:
        raw, found = text.encode(), (ctypes.c_int32 * (len(text.encode()) + 8))()
        n = llama_cpp.llama_tokenize(vocab, raw, len(raw), found, len(found), special, special)
        assert n >= 0
        return list(found[:n])

    n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
    golden = {
        "n_vocab": n_vocab,
        "eos": llama_cpp.llama_vocab_eos(vocab),
        "eog": [i for i in range(n_vocab) if llama_cpp.llama_vocab_is_eog(vocab, i)],
        "cases": [{"text": text, "ids": ids(text, False), "ids_special": ids(text, True)} for text in texts(special)],
        "metadata": values,
    }
    (OUT / f"{name}.json").write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    llama_cpp.llama_backend_init()
    for chosen in sys.argv[1:] or VOCABULARIES:
        make(chosen)
