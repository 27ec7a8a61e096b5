"""What `bench_step.py` measures: groups of cases, each of which is one table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One length of one model, and who takes turns at it."""

    group: str
    model: str
    tokens: int
    providers: tuple[str, ...]
    rounds: int = 2


K = 1024
CHECKPOINTED = ("hf+checkpointing", "liger+checkpointing", "lemo+checkpointing", "lemo+offload")
OFFLOAD = (
    "lemo+checkpointing",
    "lemo+offload",
    "lemo+transformers-offload",
    "lemo+some-offload",
    "lemo+some-offload-uniform",
)
STORED = (
    "liger+checkpointing",
    "lemo+checkpointing",
    "lemo+some-stored",
    "lemo+fp8+some-stored",
    "lemo+fp8+most-stored",
)
AXOLOTL = ("hf+axolotl", "liger+axolotl", "liger+checkpointing", "lemo+checkpointing")
GROWTH = (8 * K, 32 * K, 128 * K, 256 * K, 512 * K)
PAPER = ("hf", "s2attn", "lemo", "lemo+graph", "lemo+mlp", "lemo+selective")
GROUPS = {
    "plain": [Case("plain", "Llama-3 8B", 16 * K, ("hf", "liger", "lemo", "lemo+some-mlp"))],
    "checkpointing": [Case("checkpointing", "Llama-3 8B", 64 * K, CHECKPOINTED)],
    "stored": [Case("stored", "Llama-3 8B", 64 * K, STORED)],
    "axolotl": [Case("axolotl", "Llama-3 8B", 64 * K, AXOLOTL)],
    "offload": [Case("offload", "Llama-3 8B", 64 * K, OFFLOAD)],
    "growth": [Case("growth", "Llama-3 8B", tokens, CHECKPOINTED, rounds=1) for tokens in GROWTH],
    "fp8": [
        Case("fp8", "Llama-3 8B", 16 * K, ("lemo", "lemo+fp8")),
        Case("fp8", "Llama-3 8B", 64 * K, ("lemo+checkpointing", "lemo+fp8+checkpointing")),
    ],
    "short": [
        Case("short", "Llama-3 8B", tokens, ("hf", "liger", "lemo", "lemo+graph"), rounds=3)
        for tokens in (K, 2 * K, 4 * K, 8 * K)
    ],
    "paper": [
        Case("paper", model, tokens, PAPER)
        for model in ("Llama-2 7B", "OPT-6.7B")
        for tokens in (4 * K, 8 * K)
    ],
}
