"""Binds a forward pass to a file: hyper-parameters by key, tensors by name, every shape checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Literal, TypeAlias

from engine.devices.graph import Table, Vector, Weight
from engine.errors import GGUFError, UnsupportedModelError
from engine.gguf.metadata import Metadata
from engine.gguf.model_file import TensorInfo
from engine.model_spec import AttentionSpec, CompressedAttentionSpec, LatentAttentionSpec, ModelSpec, MoESpec, RopeSpec
from engine.quants.formats import I32

RopeStyle: TypeAlias = Literal["neox", "norm"]
Scoring: TypeAlias = Literal["softmax", "sigmoid", "softmax_of_chosen", "sqrt_softplus"]
Use: TypeAlias = Literal["values", "weights", "integers"]
"""What becomes of a tensor: float32 values, a matrix or some of them, or a table of integers."""

SECTIONS = "rope.dimension_sections"
# Whose pairs take the axes of multi-axis rotation in turn. With others they follow one another, all with the position
# of a text token, which is no different from one axis.
_INTERLEAVED = frozenset({"qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "qwen4exp"})
_GATING_FUNCTIONS: dict[int, Scoring] = {1: "softmax", 2: "sigmoid", 3: "softmax_of_chosen", 4: "sqrt_softplus"}
_LARGEST_CAP = 1e6  # of logits and scores; 30 or 50 in all files
_LARGEST = 1 << 31  # no size in a model file is larger than this; anything else is a broken file
# What the kernels of every device can do.
LARGEST_HEAD, LARGEST_STATE, _LARGEST_KERNEL, _MOST_EXPERTS = 576, 256, 16, 1024


class Keys:
    """Hyper-parameters of one architecture: keys without their `<architecture>.` prefix."""

    def __init__(self, metadata: Metadata, tensors: Tensors, architecture: str) -> None:
        self._metadata = metadata
        self._n_tensors = len(tensors)
        self.file_name = tensors.file_name
        self.architecture = architecture
        self._has_heads = True

    def has(self, key: str) -> bool:
        """Return whether the file has the key."""
        return f"{self.architecture}.{key}" in self._metadata

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        return self._metadata.text(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number that is finite."""
        value = self._metadata.number(f"{self.architecture}.{key}", default)
        if not math.isfinite(value):
            raise self.wrong(key, value, "a finite number")
        return value

    def cap(self, key: str, default: float = 0.0) -> float:
        """Return what values are smoothly brought to within; 0: they are not."""
        cap = self.number(key, default)
        if cap and not 1.0 <= cap <= _LARGEST_CAP:
            raise self.wrong(key, cap, f"a number from 1 to {_LARGEST_CAP:.0f}, or 0 for none")
        return cap

    def size(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return a size: an integer of at least `minimum`. An array of equal values is taken as that value."""
        values = set(self.sizes(key, default, minimum=minimum))
        if len(values) != 1:
            raise self._differs(key, values)
        return values.pop()

    def _differs(self, key: str, values: set[int]) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.file_name}: {self.architecture}.{key} differs between layers "
            f"({', '.join(map(str, sorted(values)))}); this version needs one value for all layers"
        )

    def sizes(self, key: str, default: int | None = None, *, minimum: int = 0) -> list[int]:
        """Return one size, or one for each layer, as a list."""
        values = self.integers(key, default)
        for value in values:
            if not minimum <= value < _LARGEST:
                raise self.wrong(key, value, f"an integer from {minimum} to {_LARGEST - 1}")
        return values

    def integers(self, key: str, default: int | None = None) -> list[int]:
        """Return one integer of any size, or an array of them, as a list."""
        name = f"{self.architecture}.{key}"
        if name in self._metadata and self._metadata.is_array(name):
            return self._metadata.integers(name)
        return [self._metadata.integer(name, default)]

    def at_most(self, key: str, value: int, most: int) -> int:
        """Return a key's value if the kernels can work with it."""
        if value > most:
            raise UnsupportedModelError(
                f"{self.file_name}: {self.architecture}.{key} is {value}; this version computes at most {most}"
            )
        return value

    def kernel_size(self, key: str) -> int:
        """Return how many tokens a convolution sees."""
        return self.at_most(key, self.size(key, minimum=2), _LARGEST_KERNEL)

    def state_size(self, key: str = "ssm.state_size") -> int:
        """Return how long the vectors are that a recurrent layer writes and reads with."""
        return self.at_most(key, self.size(key), LARGEST_STATE)

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        return self._metadata.flag(f"{self.architecture}.{key}", default)

    def flags(self, key: str) -> list[bool]:
        """Return an array of booleans."""
        return self._metadata.flags(f"{self.architecture}.{key}")

    def is_array(self, key: str) -> bool:
        """Return whether the file gives an array."""
        return self.has(key) and self._metadata.is_array(f"{self.architecture}.{key}")

    def wrong(self, key: str, found: object, expected: str) -> GGUFError:
        """Make the error for a value that makes no sense."""
        return GGUFError(f"{self.file_name}: {self.architecture}.{key} is {found}; expected {expected}")

    def n_blocks(self) -> int:
        """Return the number of blocks, which each have tensors."""
        n_blocks = self.size("block_count")
        if n_blocks > self._n_tensors:
            raise self.wrong("block_count", n_blocks, f"at most {self._n_tensors}, the number of tensors")
        return n_blocks

    def without_heads(self) -> Keys:
        """Return the keys of a file that counts blocks for multi-token prediction which it does not hold."""
        keys = copy(self)
        keys._has_heads = False
        return keys

    def n_layers(self) -> int:
        """Return the blocks that are run: those for multi-token prediction come last and are left out."""
        n_blocks = self.n_blocks()
        n_mtp = self.size("nextn_predict_layers", 0, minimum=0) if self._has_heads else 0
        if n_mtp >= n_blocks:
            raise self.wrong("nextn_predict_layers", n_mtp, f"less than block_count ({n_blocks})")
        return n_blocks - n_mtp

    def n_layers_told(self) -> int:
        """Return for how many layers values are looked for: those that are run, and the first one behind them."""
        return min(self.n_layers() + 1, self.n_blocks())

    def with_head(self, spec: ModelSpec, tensors: Tensors, *, carries_stream: bool = False) -> ModelSpec:
        """Return a model that drafts tokens by the block for multi-token prediction, if the file has one.

        Of several blocks each guesses one token of a row, behind those of the blocks before it. The first one is used,
        for one token.
        """
        n_layers, n_mtp = self.n_layers(), self.size("nextn_predict_layers", 0, minimum=0)
        if not tensors.block(n_layers).has("nextn.eh_proj.weight"):
            return spec
        return replace(spec, draft_layer=n_layers, most_guesses=int(n_mtp > 1), carries_stream=carries_stream)

    def model(
        self, tensors: Tensors, attention: AttentionSpec | LatentAttentionSpec | CompressedAttentionSpec, moe: MoESpec
    ) -> ModelSpec:
        """Read what every architecture has, around its attention and its experts."""
        return ModelSpec(
            architecture=self.architecture,
            name=self._metadata.text("general.name", self.file_name),
            n_layers=self.n_layers(),
            hidden_size=self.size("embedding_length"),
            n_vocab=tensors.shape("token_embd.weight")[0],
            context_length=self.size("context_length"),
            norm_eps=self._norm_eps(),
            attention=attention,
            moe=moe,
        )

    def _norm_eps(self) -> float:
        """Return the epsilon of norms; some converters write it under the name of another kind of norm."""
        names = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
        return self.number(names[self.has(names[1]) and not self.has(names[0])])

    def mixture(
        self,
        tensors: Tensors,
        *,
        scoring: Scoring = "softmax",
        normalize: bool | None = True,
        scales: bool = False,
        weights_input: bool = False,
    ) -> MoESpec:
        """Read the numbers of routed experts; what an architecture fixes or defaults to is passed in.

        With None for `normalize` the file says whether weights are normalised, with `scales` what they are multiplied
        by. Widths are those of the tensors: what the keys for them mean differs between architectures. Groups are read
        for every architecture. A dense sibling has no experts.
        """
        n_experts = self.size("expert_count", 0, minimum=0)
        if not n_experts:
            return MoESpec()
        self.at_most("expert_count", n_experts, _MOST_EXPERTS)
        layers_used = self.sizes("expert_used_count")
        n_experts_used = max(layers_used, default=0) or self.size("expert_used_count")
        if n_experts_used > n_experts:
            raise self.wrong("expert_used_count", n_experts_used, f"at most expert_count ({n_experts})")
        n_groups = max(1, self.size("expert_group_count", 1, minimum=0))
        n_groups_used = max(1, self.size("expert_group_used_count", n_groups, minimum=0))
        if n_experts % n_groups or n_groups_used > n_groups:
            raise self.wrong("expert_group_count", n_groups, f"a divisor of expert_count, at least {n_groups_used}")
        if n_groups > 1 and (n_experts // n_groups < 2 or n_groups_used * (n_experts // n_groups) < n_experts_used):
            raise self.wrong("expert_group_count", n_groups, f"groups that hold {n_experts_used} experts between them")
        n_layers, differ = self.n_layers(), len({n for n in layers_used if n}) > 1
        if differ and len(layers_used) < n_layers:
            raise self.wrong("expert_used_count", layers_used, f"one number, or one for each of {n_layers} layers")
        return MoESpec(
            n_experts,
            n_experts_used,
            tensors.largest_width("ffn_down_exps.weight", n_layers),
            tensors.first_width("ffn_down_shexp.weight", n_layers),
            scoring,
            self.flag("expert_weights_norm", False) if normalize is None else normalize,
            (self.number("expert_weights_scale", 1.0) or 1.0) if scales else 1.0,  # 0 in the file stands for none
            n_groups,
            n_groups_used,
            weights_input,
            layer_experts_used=tuple(layers_used[: self.n_layers_told()]) if differ else (),
        )

    def limited(self, moe: MoESpec) -> MoESpec:
        """Return experts with what their factors are clamped to; other networks have the same limits, or their own."""
        limits, own = self.floats_of_layers("swiglu_clamp_exp"), "swiglu_clamp_shexp"
        return replace(moe, limits=limits, shared_limits=self.floats_of_layers(own) if self.has(own) else limits)

    def scoring(self, default: Scoring) -> Scoring:
        """Return how the router scores experts."""
        number = self.size("expert_gating_func", 0, minimum=0)
        if number == 0:
            return default
        if number not in _GATING_FUNCTIONS:
            raise UnsupportedModelError(
                f"{self.file_name}: {self.architecture}.expert_gating_func is {number}; this version knows "
                "1 (softmax), 2 (sigmoid), 3 (softmax of the chosen) and 4 (square root of softplus)"
            )
        return _GATING_FUNCTIONS[number]

    def attention(self, style: RopeStyle = "neox") -> AttentionSpec:
        """Read the keys of softmax attention that every architecture has."""
        layer_heads = self._heads("attention.head_count")
        n_heads = max(layer_heads)
        layer_kv_heads = self._heads("attention.head_count_kv", n_heads)
        n_kv_heads = max(layer_kv_heads)
        for layer in range(max(len(layer_heads), len(layer_kv_heads))):
            own, own_kv = layer_heads[layer % len(layer_heads)], layer_kv_heads[layer % len(layer_kv_heads)]
            if own % own_kv:
                raise self.wrong("attention.head_count_kv", own_kv, f"a divisor of attention.head_count ({own})")
        head_dim = self.size("attention.key_length", max(1, self.size("embedding_length") // n_heads))
        value_dim = self.size("attention.value_length", head_dim)
        self.at_most("attention.key_length", head_dim, LARGEST_HEAD)
        self.at_most("attention.value_length", value_dim, LARGEST_HEAD)
        scale = self.number("attention.scale", 0.0) or head_dim**-0.5
        return AttentionSpec(
            n_heads,
            n_kv_heads,
            head_dim,
            scale,
            self.rope(head_dim, style),
            layer_heads=layer_heads if len(layer_heads) > 1 else (),
            layer_kv_heads=layer_kv_heads if len(layer_kv_heads) > 1 else (),
            value_dim=value_dim if value_dim != head_dim else 0,
        )

    def _heads(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """Return one number of heads, or one for each layer where they differ; 0, for no attention, does not count."""
        numbers = self.sizes(key, default)
        heads = [n for n in numbers if n]
        if not heads:
            raise self.wrong(key, numbers, "at least one head somewhere")
        if len(set(heads)) == 1:
            return (heads[0],)
        if len(heads) < len(numbers) or len(heads) < self.n_layers():
            raise self.wrong(key, numbers, f"one number, or one for each of {self.n_layers()} layers")
        return tuple(heads[: self.n_layers_told()])

    def floats_of_layers(self, key: str) -> tuple[float, ...]:
        """Return one number for each layer; none at all if the file has none, or if all are 0."""
        if not self.has(key):
            return ()
        n_layers, n_told = self.n_layers(), self.n_layers_told()
        values = self._metadata.numbers(f"{self.architecture}.{key}") if self.is_array(key) else [self.number(key)]
        values = values * n_told if len(values) == 1 else values
        if len(values) < n_layers or not all(math.isfinite(value) and value >= 0 for value in values):
            raise self.wrong(key, values, f"one number of at least 0 for each of {n_layers} layers")
        return tuple(values[:n_told]) if any(values[:n_told]) else ()

    def flags_of_layers(self, key: str, n_told: int | None = None) -> list[bool]:
        """Return one boolean for each layer; with `n_told` for so many if the file has them."""
        flags, n_layers = self.flags(key), self.n_layers()
        if len(flags) < n_layers:
            raise self.wrong(key, f"{len(flags)} values", f"one for each of {n_layers} layers")
        return flags[: n_told or n_layers]

    def windows(self, n_layers: int, period: int, *, without: int = -1) -> tuple[int, ...]:
        """Return the window of each layer, 0 for one of every `period`, by default the last, or as a key says."""
        window = self.size("attention.sliding_window", minimum=0)
        pattern = "attention.sliding_window_pattern"
        if self.is_array(pattern):
            return tuple(window if flag else 0 for flag in self.flags_of_layers(pattern, self.n_layers_told()))
        period = self.size(pattern, period)
        return tuple(window if layer % period != without % period else 0 for layer in range(n_layers))

    def window_rope(self, rope: RopeSpec) -> RopeSpec:
        """Return the rotation of layers with a window: that of the others, perhaps with a base of its own."""
        return replace(rope, freq_base=self.freq_base("rope.freq_base_swa", rope.freq_base))

    def need_one_rotation(self, rope: RopeSpec) -> None:
        """Refuse a file in which layers with a window have a rotation of their own."""
        window_base = self.window_rope(rope).freq_base
        if window_base != rope.freq_base:
            raise UnsupportedModelError(
                f"{self.file_name}: {self.architecture}.rope.freq_base_swa is {window_base:g}; this version needs "
                f"that of rope.freq_base ({rope.freq_base:g})"
            )

    def local_rope(self, head_dim: int, freq_base: float) -> RopeSpec:
        """Read the keys of the plain rotation that layers with a window have where it is not that of the others."""
        n_rot = self.size("rope.dimension_count_swa", self.size("rope.dimension_count", head_dim))
        if n_rot % 2 or n_rot > head_dim:
            raise self.wrong("rope.dimension_count_swa", n_rot, f"an even number up to the head size {head_dim}")
        return RopeSpec(n_rot, self.freq_base("rope.freq_base_swa", freq_base))

    def freq_base(self, key: str, default: float) -> float:
        """Return what the frequencies of a rotation are powers of."""
        freq_base = self.number(key, default)
        if freq_base <= 1:
            raise self.wrong(key, freq_base, "a number above 1")
        return freq_base

    def unscaled_rope(self, head_dim: int, style: RopeStyle = "neox") -> RopeSpec:
        """Read the keys of rotary position embedding that is never stretched."""
        rope = self.rope(head_dim, style)
        if rope.scaling != "none":
            raise UnsupportedModelError(
                f"{self.file_name}: {self.architecture}.rope.scaling.type is {rope.scaling!r}; this version needs none"
            )
        return rope

    def yarn(self, rope: RopeSpec, fast: float = 32.0, slow: float = 1.0) -> RopeSpec:
        """Read when YaRN keeps a pair and when it stretches it, where files may say that; how it mixes is fixed."""
        factor = self.number("rope.scaling.yarn_ext_factor", 1.0)
        if factor != 1:
            name = f"{self.architecture}.rope.scaling.yarn_ext_factor"
            raise UnsupportedModelError(f"{self.file_name}: {name} is {factor:g}; this version needs 1")
        fast = self.number("rope.scaling.yarn_beta_fast", fast)
        slow = self.number("rope.scaling.yarn_beta_slow", slow)
        if not 0 < slow <= fast:
            raise self.wrong(
                "rope.scaling.yarn_beta_slow", slow, f"a number above 0, at most yarn_beta_fast ({fast:g})"
            )
        return replace(rope, yarn_fast=fast, yarn_slow=slow)

    def rope(self, head_dim: int, style: RopeStyle = "neox", *, yarn_slope: float = 0.1) -> RopeSpec:
        """Read the keys of rotary position embedding."""
        n_rot = self.size("rope.dimension_count", head_dim)
        if n_rot % 2 or n_rot > head_dim:
            raise self.wrong("rope.dimension_count", n_rot, f"an even number up to the head size {head_dim}")
        freq_base = self.freq_base("rope.freq_base", 10000.0)
        sections = self.sizes(SECTIONS) if self.architecture in _INTERLEAVED and self.has(SECTIONS) else []
        older = self.number("rope.scale_linear", 1.0)  # the name in files of 2023
        factor = self.number("rope.scaling.factor", older) or 1.0  # 0 in the file stands for none
        scaling = self.text("rope.scaling.type", "linear" if factor != 1.0 else "none")
        if scaling not in {"none", "linear", "yarn", "longrope"}:
            raise UnsupportedModelError(
                f"{self.file_name}: {self.architecture}.rope.scaling.type is {scaling!r}; this version knows none, "
                "linear, yarn and longrope"
            )
        if scaling != "none" and factor <= 0:
            raise self.wrong("rope.scaling.factor", factor, "a number above 0")
        return RopeSpec(
            n_rot,
            freq_base,
            style,
            tuple(sections),
            scaling,  # type: ignore[arg-type]
            factor,
            self.size("rope.scaling.original_context_length", self.size("context_length")),
            self.number("rope.scaling.attn_factor", 1.0) or 1.0,
            yarn_slope,
        )


class Tensors:
    """Tensors of a file by name, below an optional prefix. Only shapes are looked at; no weight is read."""

    def __init__(self, file_name: str, infos: Mapping[str, TensorInfo]) -> None:
        self.file_name = file_name
        self._infos = infos
        self.prefix = ""

    def __len__(self) -> int:
        return len(self._infos)

    def block(self, layer: int) -> Tensors:
        """Return the tensors of one block, by their names inside it."""
        return self._below(f"blk.{layer}.")

    @property
    def whole(self) -> Tensors:
        """Return all tensors, by their full names."""
        return self._below("")

    def _below(self, prefix: str) -> Tensors:
        tensors = copy(self)
        tensors.prefix = prefix
        return tensors

    def has(self, name: str) -> bool:
        """Return whether the file has the tensor."""
        return self.prefix + name in self._infos

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, slowest dimension first."""
        return self._find(name).shape

    def first_width(self, name: str, n_layers: int) -> int:
        """Return the inputs of a matrix that some blocks have, as the first of them stores it; 0 if none has it."""
        blocks = (self.block(layer) for layer in range(n_layers))
        return next((block.shape(name)[-1] for block in blocks if block.has(name)), 0)

    def largest_width(self, name: str, n_layers: int) -> int:
        """Return the inputs of a matrix that some blocks have, of the widest; 0 if none has it."""
        blocks = (self.block(layer) for layer in range(n_layers))
        return max((block.shape(name)[-1] for block in blocks if block.has(name)), default=0)

    def vector(self, name: str, *shape: int) -> Vector:
        """Return a tensor that is used as float32 values."""
        info = self._checked(name, shape, "values")
        return Vector(info.name, info.format, math.prod(shape))

    def optional_vector(self, name: str, *shape: int) -> Vector | None:
        """Return such a tensor, or None if the file does not have it."""
        return self.vector(name, *shape) if self.has(name) else None

    def first_values(self, name: str, size: int) -> Vector | None:
        """Return the first values of a tensor, or None if the file does not have it."""
        if not self.has(name):
            return None
        stored_size = math.prod(self.shape(name))
        if stored_size <= size:
            return self.vector(name, size)
        return split_values(self.vector(name, stored_size), size, stored_size - size)[0]

    def matrix(self, name: str, n_rows: int, n_cols: int, *, scaled: bool = True) -> Weight:
        """Return a matrix that maps `n_cols` inputs to `n_rows` outputs, with its scale if the file has one.

        Without `scaled` the tensor that is named like one is something else.
        """
        info = self._checked(name, (n_rows, n_cols), "weights")
        return Weight(info.name, info.format, n_rows, n_cols, scale=self._scale(name, 1) if scaled else None)

    def experts(self, name: str, n_experts: int, n_rows: int, n_cols: int) -> Weight:
        """Return one such matrix for each expert."""
        info = self._checked(name, (n_experts, n_rows, n_cols), "weights")
        return Weight(info.name, info.format, n_rows, n_cols, n_experts, scale=self._scale(name, n_experts))

    def table(self, name: str, n_rows: int, n_cols: int) -> Table:
        """Return integers for each token id."""
        info = self._checked(name, (n_rows, n_cols), "integers")
        return Table(info.name, n_rows, n_cols)

    def _scale(self, name: str, size: int) -> Vector | None:
        """Return the factor that some formats (NVFP4), or models for each expert, keep in a tensor of their own."""
        scale = name.removesuffix(".weight") + ".scale"
        return self.vector(scale, size) if self.has(scale) else None

    def _find(self, name: str) -> TensorInfo:
        info = self._infos.get(self.prefix + name)
        if info is None:
            raise GGUFError(f"{self.file_name}: tensor {self.prefix + name} is missing")
        return info

    def _checked(self, name: str, shape: tuple[int, ...], use: Use) -> TensorInfo:
        info = self._find(name)
        if (info.format == I32) != (use == "integers"):
            expected = "integers (I32)" if use == "integers" else "weights"
            raise GGUFError(
                f"{self.file_name}: tensor {info.name} has the type {info.format.name}; expected {expected}"
            )
        if _without_ones(info.shape) != _without_ones(shape):
            raise GGUFError(
                f"{self.file_name}: tensor {info.name} has the shape {list(info.shape)}; "
                f"by the file's metadata it must be {list(shape)}"
            )
        return info


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def split_values(vector: Vector, *sizes: int) -> list[Vector]:
    """Take a vector apart into parts of those sizes that follow one another."""
    assert sum(sizes) == vector.size
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        replace(vector, size=size, first=start, stored_size=vector.size)
        for start, size in zip(starts, sizes, strict=True)
    ]


def split_rows(weight: Weight, *sizes: int) -> list[Weight]:
    """Take a matrix (or each expert's) apart into parts of `sizes` rows that follow one another."""
    assert sum(sizes) == weight.n_rows
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        replace(weight, n_rows=size, first_row=start, stored_rows=weight.n_rows)
        for start, size in zip(starts, sizes, strict=True)
    ]
