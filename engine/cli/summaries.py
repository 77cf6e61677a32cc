"""What answers took and an engine did, in a line or two for people."""

from __future__ import annotations

from engine.generate.answer import Completion
from engine.runtime import EngineStatistics

_VIRTUAL = " (speeds of a virtual clock)"


def describe(completion: Completion, *, is_virtual: bool = False) -> str:
    """Return one line about an answer: tokens, speed (of a virtual clock or not), why it ended."""
    usage, timings = completion.usage, completion.timings
    reused = f" ({usage.n_reused_tokens} reused)" if usage.n_reused_tokens else ""
    drafted = f" ({usage.n_drafted_tokens} drafted)" if usage.n_drafted_tokens else ""
    return (
        f"prompt {usage.n_prompt_tokens} tokens{reused}, {timings.prompt_tok_s:,.1f} tok/s; "
        f"answer {usage.n_generated_tokens} tokens{drafted}, {timings.decode_tok_s:,.1f} tok/s; "
        f"ended by {completion.finish_reason}; seed {completion.seed}{_VIRTUAL if is_virtual else ''}"
    )


def speed(statistics: EngineStatistics) -> str:
    """Return how fast an engine was so far, and how often its cache had what was needed."""
    seconds = statistics.prompt_s + statistics.decode_s
    text = f"{(statistics.n_prompt_tokens + statistics.n_decode_tokens) / seconds if seconds else 0.0:,.1f} tok/s"
    if statistics.cache is not None:
        text += f", {statistics.cache.hit_rate:.0%} of experts from VRAM"
    return text + (_VIRTUAL if statistics.has_virtual_clock else "")


def statistics_text(statistics: EngineStatistics) -> str:
    """Return what an engine has done, for people."""
    s = statistics
    kept = f", {s.snapshot_bytes / 2**20:,.1f} of them to go back to" if s.snapshot_bytes else ""
    drafts = f" ({s.n_drafts_right} of {s.n_drafts} drafts right)" if s.n_drafts else ""
    return (
        f"{s.n_requests} answers; prompts {s.n_prompt_tokens} tokens, {s.prompt_tok_s:,.1f} tok/s "
        f"({s.n_reused_tokens} more reused); answers {s.n_decode_tokens} tokens, {s.decode_tok_s:,.1f} tok/s{drafts}\n"
        f"{s.device}; {s.ram_bytes / 2**20:,.1f} MiB of weights, states and scratch"
        f"{kept}; {s.cache_line}"
    )
