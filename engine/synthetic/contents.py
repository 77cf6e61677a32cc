"""Weights for made-up models: random ones of a size that keeps values sane on their way through all layers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine import _kernels
from engine.gguf.model_file import TensorInfo
from engine.quants.formats import I32
from engine.synthetic.published import Published

_NORMS = (  # around 1
    *("norm.weight", "norm_1.weight", "norm_2.weight", "norm_key.weight", "norm_query.weight", "norm_conv.weight"),
    *(".scale", "_scale.weight"),
)
_ZEROS = ("bias", "_base.weight", "_ape.weight", "attn_sinks.weight")


def fill(info: TensorInfo, out: npt.NDArray[np.uint8], seed: int, published: Published, n_threads: int) -> None:
    """Fill `out`, the bytes of a tensor of a model."""
    if info.format == I32:
        _fill_table(out.view(np.int32).reshape(info.shape), published.size("expert_count"), seed)
        return
    bounds_decays = "kda.gate_lower_bound" in published.keys  # files have the rates as they are, else their negatives
    drawn = _draw(info, np.random.default_rng(seed), 1 if bounds_decays else -1)
    if drawn is not None:
        out.view(np.float32).reshape(info.shape)[:] = drawn
    else:
        rows = out.reshape(-1, info.format.row_bytes(info.shape[-1]))
        _kernels.fill_random_blocks(info.format.ggml_type, rows, info.shape[-1], seed, n_threads)


def _fill_table(experts: npt.NDArray[np.int32], n_experts: int, seed: int) -> None:
    """Choose different experts for each token id, [n_vocab, n_experts_used]."""
    n_vocab, n_used = experts.shape
    first = np.random.default_rng(seed).integers(0, n_experts, (n_vocab, 1))
    experts[:] = (first + np.arange(n_used) * (n_experts // n_used)) % n_experts


def _draw(info: TensorInfo, random: np.random.Generator, decay_sign: int) -> npt.NDArray[np.float64] | None:
    """Return values of a tensor that must have a certain size; None for those that may be as matrices are."""
    if info.name.endswith(_NORMS):
        return 1 + 0.1 * random.standard_normal(info.shape)
    if info.name == "rope_freqs.weight":  # a quarter of the pairs turn
        return np.where(np.arange(info.shape[0]) < info.shape[0] // 4, 1.0, 1e30)
    if info.name.endswith("ssm_a"):  # decay rates, as these layers are initialised for training
        return decay_sign * random.uniform(1, 16, info.shape)
    if info.name.endswith("ssm_dt.bias"):  # softplus of it is a time step from 0.001 to 0.1
        step = np.exp(random.uniform(np.log(1e-3), np.log(1e-1), info.shape))
        return step + np.log(-np.expm1(-step))
    return np.zeros(info.shape) if info.name.endswith(_ZEROS) else None
