"""The tensors of a model that has no file: those that its forward pass takes, noted while that is recorded."""

from __future__ import annotations

from math import prod

from engine.gguf.metadata import Metadata
from engine.gguf.model_file import TensorInfo
from engine.gguf.recipes import Recipe, choose_format
from engine.models import ARCHITECTURES
from engine.models.binding import Keys, Tensors, Use
from engine.quants.formats import BY_NAME, I32, QuantFormat
from engine.synthetic.published import Published

_ROUTERS = "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight"  # F32 in every recipe, as all that is not a matrix
# Of the blocks behind the leading dense ones: what they all have, and what they have if there is a shared expert.
_ROUTED = "ffn_gate_inp.weight", "ffn_down_exps.weight"
_SHARED = "ffn_gate_shexp.weight", "ffn_down_shexp.weight"
# Where a forward pass goes by the size of a tensor, the key that files have for it.
_SIZES = {
    "ffn_down.weight": "feed_forward_length",
    "ffn_down_chexps.weight": "expert_chunk_feed_forward_length",
    "ffn_down_exps.weight": "expert_feed_forward_length",
    "ffn_up.weight": "feed_forward_length",
}


def record_tensors(name: str, published: Published, metadata: Metadata, recipe: Recipe) -> dict[str, TensorInfo]:
    """Return the tensors of a model by name, in order of first use."""
    tensors, architecture = _Recorder(name, published, recipe), ARCHITECTURES[published.architecture]
    spec = architecture.read_spec(Keys(metadata, tensors, published.architecture), tensors)
    architecture.forward(spec, tensors)
    return tensors.infos


class _Recorder(Tensors):
    """Has every tensor that it is asked for, in the shape that is expected; optional ones if the model has them."""

    def __init__(self, file_name: str, published: Published, recipe: Recipe) -> None:
        self.infos: dict[str, TensorInfo] = {}
        super().__init__(file_name, self.infos)
        self._published = published
        self._recipe = recipe

    def __len__(self) -> int:
        return self._published.size("block_count")  # there are no fewer

    def has(self, name: str) -> bool:
        """Return whether the model has the tensor."""
        published = self._published
        if name in published.layers:
            return bool(published.layers[name][self._layer])
        if name in _ROUTED + _SHARED:
            n_dense = published.size("leading_dense_block_count", 0)
            is_routed = published.size("expert_count", 0) > 0 and self._layer >= n_dense
            return is_routed and (name in _ROUTED or self._shared_size > 0)
        return name in published.tensors or name in published.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a shape as far as a forward pass goes by it: one size.

        That is 0 where neither an entry nor a key says it, which is no special size, so that the usual one is taken.
        """
        if name in self._published.shapes:
            return self._published.shapes[name]
        if name == "token_embd.weight":
            return (self._published.n_vocab,)
        if name == "ffn_down_shexp.weight":
            return (self._shared_size,)
        return (self._published.size(_SIZES[name]) if name in _SIZES else 0,)

    def _checked(self, name: str, shape: tuple[int, ...], use: Use) -> TensorInfo:
        full_name = self.prefix + name
        if full_name not in self.infos:
            shape = self._published.shapes.get(name, _without_leading_ones(shape))
            assert all(shape), f"the size of {full_name} is not known"
            chosen = self._format(name, shape[-1], use)
            n_bytes = prod(shape[:-1]) * chosen.row_bytes(shape[-1])
            self.infos[full_name] = TensorInfo(full_name, chosen, shape, n_bytes)
        return super()._checked(name, shape, use)

    def _format(self, name: str, n_cols: int, use: Use) -> QuantFormat:
        if use == "integers":
            return I32
        if use == "values" or name in _ROUTERS:
            return BY_NAME["F32"]
        is_output = name == "token_embd.weight" and not self.has("output.weight")
        role = "output.weight" if is_output else self.prefix + name
        return choose_format(self._recipe, role, self._layer, self._published.size("block_count"), n_cols)

    @property
    def _layer(self) -> int:
        return int(self.prefix.split(".")[1]) if self.prefix else 0

    @property
    def _shared_size(self) -> int:
        """Return the width of the shared expert; 0 if there is none."""
        published = self._published
        whole = published.size("expert_shared_count", 0) * published.size("expert_feed_forward_length")
        return published.size("expert_shared_feed_forward_length", whole)


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape as files have it: a matrix of one row is a vector."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
