"""The same prompts and numbers of tokens on another program, through its Python package, on the same file.

It is given the tokens of its answers, random ones, and looks for the likeliest logit of each; ours are drawn and read
as text, which takes longer, if anything.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

from engine.bench.measure import Progress, Row, Sample, random_tokens, summarise, with_bandwidth
from engine.errors import RequestError

PEERS = ("llama.cpp",)


def measure_llama_cpp(
    path: str,
    *,
    prompt_lengths: Sequence[int],
    n_gen: int,
    reps: int,
    n_threads: int,
    n_batch: int,
    token_bytes: int,
    buffer_bytes: int,
    progress: Progress,
) -> list[Row]:
    """Time llama.cpp on the CPU, through llama-cpp-python; return a row for each prompt length.

    Raises `RequestError` if the package is not installed, or cannot open the file.
    """
    api = import_llama_cpp()
    quiet = api.llama_log_callback(lambda _level, _text, _data: None)  # else it writes pages to standard error
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    model_params = api.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(path.encode(), model_params)
    if not model:
        raise RequestError(f"llama.cpp (llama-cpp-python {_version()}) cannot open {path}")
    try:
        params = api.llama_context_default_params()
        params.n_ctx = max(prompt_lengths) + n_gen + 1
        params.n_batch = params.n_ubatch = n_batch
        params.n_threads = params.n_threads_batch = n_threads
        context = api.llama_init_from_model(model, params)
        if not context:
            raise RequestError(f"llama.cpp (llama-cpp-python {_version()}) cannot make a context for {path}")
        try:
            n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
            samples: dict[int, list[Sample]] = {n: [] for n in prompt_lengths}
            total, done = reps * len(prompt_lengths), 0
            _run(api, context, random_tokens(16, n_vocab), 8, n_batch)
            for _ in range(reps):
                for n_prompt in prompt_lengths:
                    progress(f"llama.cpp, {n_prompt} + {n_gen} tokens", done, total)
                    tokens = random_tokens(n_prompt + n_gen, n_vocab)
                    run = partial(_run, api, context, tokens, n_prompt, n_batch)
                    samples[n_prompt].append(with_bandwidth(run, n_threads, buffer_bytes))
                    done += 1
            progress("llama.cpp", total, total)
            note = f"llama-cpp-python {_version()}"
            return [summarise("llama.cpp, CPU", samples[n], n, n_gen, token_bytes, note) for n in prompt_lengths]
        finally:
            api.llama_free(context)
    finally:
        api.llama_model_free(model)


def import_llama_cpp() -> ModuleType:
    """Return llama-cpp-python's low-level module; raise `RequestError` saying how to install it."""
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    except ImportError as error:
        raise RequestError(
            f"--peer llama.cpp needs the package llama-cpp-python ({error}): pip install llama-cpp-python "
            "(it is compiled on this machine, which takes some minutes)"
        ) from None
    except (OSError, RuntimeError) as error:  # installed, but its library does not load
        raise RequestError(f"--peer llama.cpp: llama-cpp-python is installed but does not load: {error}") from None


def _version() -> str:
    return str(getattr(importlib.import_module("llama_cpp"), "__version__", "of unknown version"))


def _run(api: ModuleType, context: Any, tokens: list[int], n_prompt: int, n_batch: int) -> Sample:
    api.llama_memory_clear(api.llama_get_memory(context), False)
    start = time.perf_counter()
    for at in range(0, n_prompt, n_batch):
        _decode(api, context, tokens[at : min(at + n_batch, n_prompt)])
    ran = time.perf_counter()
    for token in tokens[n_prompt:]:
        _decode(api, context, [token])
    return Sample(ran - start, ran - start, time.perf_counter() - ran)


def _decode(api: ModuleType, context: Any, tokens: list[int]) -> None:
    array = (api.llama_token * len(tokens))(*tokens)
    code = api.llama_decode(context, api.llama_batch_get_one(array, len(tokens)))
    if code != 0:
        raise RequestError(f"llama.cpp could not run {len(tokens)} tokens (llama_decode returned {code})")
    api.llama_get_logits_ith(context, -1)  # waits for them
