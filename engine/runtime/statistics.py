"""What an engine is and what it has done."""

from __future__ import annotations

from dataclasses import dataclass

from engine.devices.timing import Bandwidths, LayerTimes, StepTime, Traffic
from engine.devices.traffic import WeightTraffic
from engine.experts.hot_cache import CacheStatistics
from engine.generate.answer import TokenSpeeds


@dataclass(frozen=True, slots=True)
class EngineStatistics(TokenSpeeds):
    """What an engine is and what it has done since it was opened.

    Attributes:
        model: its name and architecture, for people.
        device: where it runs, for people.
        weights: bytes of weights, and how many of them a token reads.
        file_bytes: all tensors that are used, in the file's form.
        state_bytes: keys, values and recurrent states of all sequences.
        scratch_bytes: intermediate results.
        snapshot_bytes: copies of states, from which sequences can be taken up again.
        device_bytes: memory of the GPU in use; 0 without one.
        cache_line: what the hot-expert cache holds and earns, or why there is none, for people.
        cache: what it did; None if there is none.
        time_spent: where the time of all steps went, if the device can say.
        layer_times: how device and CPU shared the time of decoding, if the device measures it.
        traffic: what they moved, if the device knows.
        bandwidths: what bounds them, if the device knows.
        has_virtual_clock: all seconds are those of a virtual clock.
        n_requests: answers begun.
        n_prompt_tokens: prompt tokens that were run.
        n_reused_tokens: prompt tokens that were held already.
        n_decode_tokens: tokens made after the first of each answer.
        prompt_s, decode_s: seconds those took.
        n_drafts: tokens that were drafted and checked.
        n_drafts_right: of the tokens made, those that were drafted.
    """

    model: str
    device: str
    weights: WeightTraffic
    file_bytes: int
    state_bytes: int
    scratch_bytes: int
    snapshot_bytes: int = 0
    device_bytes: int = 0
    cache_line: str = ""
    cache: CacheStatistics | None = None
    time_spent: StepTime | None = None
    layer_times: LayerTimes | None = None
    traffic: Traffic | None = None
    bandwidths: Bandwidths | None = None
    has_virtual_clock: bool = False
    n_requests: int = 0
    n_prompt_tokens: int = 0
    n_reused_tokens: int = 0
    n_decode_tokens: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    n_drafts: int = 0
    n_drafts_right: int = 0

    @property
    def ram_bytes(self) -> int:
        """Return the bytes of weights, states, their copies and intermediate results together."""
        return self.file_bytes + self.state_bytes + self.scratch_bytes + self.snapshot_bytes
