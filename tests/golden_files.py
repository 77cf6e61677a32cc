"""Which golden files there are: tiny models of real architectures, with logits that llama.cpp computed."""

from __future__ import annotations

from pathlib import Path

QWEN_FILES = (
    "qwen35moe/qwen35moe-fusedgu-Q8_0",
    "qwen35moe/qwen35moe-micro-F32",
    "qwen35moe/qwen35moe-micro-MXFP4",
    "qwen35moe/qwen35moe-micro-Q4_0",
    "qwen35moe/qwen35moe-micro-Q8_0",
    "qwen35moe/qwen35moe-mtp-Q8_0",
    "qwen35moe/qwen35moe-wide-IQ4_XS",
    "qwen35moe/qwen35moe-wide-Q2_K",
    "qwen35moe/qwen35moe-wide-Q3_K_M",
    "qwen35moe/qwen35moe-wide-Q4_K_M",
    "qwen3moe/qwen3moe-micro-F16",
    "qwen3moe/qwen3moe-micro-F32",
    "qwen3moe/qwen3moe-micro-Q8_0",
    "qwen3moe/qwen3moe-split-Q8_0",
    "qwen3moe/qwen3moe-tied-BF16",
    "qwen3moe/qwen3moe-wide-Q4_K_M",
    "qwen3moe/qwen3moe-wide-Q5_K_M",
)
OTHER_FILES = (
    "deepseek2/deepseek2-v2lite-micro-Q8_0",
    "deepseek2/deepseek2-v3-micro-F32",
    "deepseek2/deepseek2-v3-wide-Q4_K_M",
    "glm4moe/glm4moe-micro-F32",
    "glm4moe/glm4moe-wide-Q4_K_M",
    "gpt-oss/gpt-oss-micro-F32",
    "gpt-oss/gpt-oss-micro-MXFP4",
    "gpt-oss/gpt-oss-wide-Q4_K_M",
    "llama-moe/mixtral-micro-F32",
    "llama-moe/mixtral-wide-Q4_K_M",
    "olmoe/olmoe-micro-F32",
    "olmoe/olmoe-wide-Q6_K",
    "qwen2moe/qwen2moe-micro-F32",
    "qwen2moe/qwen2moe-wide-Q4_K_M",
    "qwen3next/qwen3next-micro-F32",
    "qwen3next/qwen3next-wide-Q4_K_M",
)
ALL_FILES = QWEN_FILES + OTHER_FILES
# Peers, too, with what llama.cpp's heads for multi-token prediction guess.
HEADS = (
    "qwen35moe-mtp",
    "qwen35-mtp",
    "qwen3next-mtp",
    "glm4moe-mtp",
    "hy_v3-mtp",
    "deepseek2-mtp",
    "step35-mtp",
    "mimo2-mtp",
    "cohere2moe-mtp",
    "bailingmoe3-mtp",
)
# Made by make_peer_fixtures.py for what the golden files lack; every checkout has them, in tests/data/peers.
PEERS = (
    "afmoe",
    "arctic",
    "bailingmoe",
    "bailingmoe2",
    "bailingmoe3",
    "bailingmoe3-vl",
    "cohere2moe",
    "dbrx",
    "deepseek",
    "deepseek32",
    "deepseek4",
    "dots1",
    "dots3note",
    "ernie4_5-moe",
    "exaone-moe",
    "gemma4",
    "glm-dsa",
    "glm5-next",
    "glm5-next-plain",
    "granite_swa",
    "granitehybrid",
    "granitemoe",
    "grok",
    "grok-1",
    "grovemoe",
    "hunyuan-moe",
    "hy_v3",
    "hy_v4",
    "hy_v4-full",
    "jamba",
    "kimi-k3",
    "kimi-k3-plain",
    "kimi-linear",
    "laguna",
    "lfm2",
    "lfm2moe",
    "llama",
    "llama4",
    "maple",
    "mellum",
    "mimo2",
    "minimax-01",
    "minimax-m2",
    "minimax-m3",
    "mistral4",
    "nemotron_h",
    "nemotron_h_moe",
    "phimoe",
    "phimoe-long",
    "qwen3",
    "qwen35",
    "qwen3vlmoe",
    "qwen4exp",
    "qwen4exp-single",
    "smallthinker",
    "step35",
)
PEER_FILES = tuple(f"{name}-{kind}" for name in PEERS for kind in ("F32", "Q8_0"))


def model_path(references: Path) -> Path:
    """The model that a file of references belongs to: one GGUF file, or the first of several."""
    path = references.with_suffix(".gguf")
    return path if path.exists() else next(references.parent.glob(references.stem + "-00001-of-*.gguf"))
