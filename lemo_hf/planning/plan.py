"""The plan of a training step: its peak of memory, part by part, from a model's config alone.

Nothing is loaded: the step itself runs without its arithmetic (`lemo_hf.planning.dry_run`), and
what it allocates is counted.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lemo_hf.config import LEVELS, UNITS, LeMoConfig
from lemo_hf.core.families import MULTIMODAL, family_of
from lemo_hf.memory.offload import GIB
from lemo_hf.planning.dry_step import DryModel, attention_of
from lemo_hf.planning.trained import Trained, check_count
from lemo_hf.planning.work import Work

# What to do about a model whose memory is not predicted.
FARTHEST = 2**22  # tokens: where looking for the longest row ends, since each look takes seconds
LOOKS = 5  # that the longest row, or the share that fits, mostly takes
MEASURE = "run a few steps and read lemo/peak_memory_gib in the logs."


@dataclass(frozen=True)
class Plan:
    """The predicted peak of ``torch.cuda.max_memory_allocated`` in one optimizer step.

    A card needs more: its CUDA context (about half a GiB), and what the allocator holds but cannot
    use (``benchmarks/results``: 2 to 20 % of the peak). Tensors count as large as they are;
    the allocator may add up to 1 MiB to each, since it splits off no less (there: 0.4 % in all).

    Attributes:
        parts: Bytes of each part at the moment of the peak.
        phase: That moment.
        phases: Bytes at the highest moment of each phase.
        levels: What each layer computes again, `LEVELS`; empty for the stock model.
        pinned: Bytes of pinned host memory.
        work: What the step does, by which `lemo_hf.planning.speed` tells its time.
        fused: It is the stock model's with fused kernels (`lemo_hf.planning.fused_rival`).
    """

    parts: dict[str, int]
    phase: str
    phases: dict[str, int]
    levels: tuple[str, ...]
    pinned: int
    work: Work
    fused: bool = False

    @property
    def peak(self) -> int:
        """Bytes, the sum of the parts."""
        return sum(self.parts.values())

    def fits(self, gib: float) -> bool:
        """Whether the peak is at most ``gib`` GiB."""
        return self.peak <= gib * GIB


class Planner:
    """Plans of one model and one way to train it, on one GPU.

    They are those of rows without padding, attention by ``sdpa`` or
    ``flash_attention_2`` (by ``lemo_sinks`` if it has sinks), LoRA without dropout, and fused
    AdamW.

    Args:
        config: Config of a transformers causal LM.
        batch_size: Number of rows.
        looked: Function to call after each planned step, which takes up to some seconds.
        **trained: Fields of `Trained`.

    Attributes:
        targets: Names of the adapted linears, or ``["all-linear"]``.
        window: The longest row that no sliding window cuts, tokens, or None.
        attention: The ``attn_implementation`` that is planned, of the stock model too.

    Raises:
        ValueError: A value is wrong, or is one whose memory is not predicted.
    """

    def __init__(
        self,
        config: Any,
        batch_size: int = 1,
        looked: Callable[[], object] | None = None,
        **trained: Any,
    ):
        check_count("batch_size", batch_size)
        self._looked = looked
        how = self._trained = Trained(**trained)
        _check_config(config)
        self.window, self.attention = _window(config), attention_of(config)
        self._model = DryModel(config, how, batch_size)
        self.targets = self._model.targets

    def plan(
        self,
        lemo: LeMoConfig | None,
        tokens: int,
        room: float | None = None,
        finish: bool = False,
        fused: bool = False,
    ) -> Plan:
        """Predict the peak memory and the work of a training step.

        Args:
            lemo: Settings of what LeMo leaves out; None: the stock model.
            tokens: Length of a row, tokens.
            room: Memory that PyTorch can use, bytes. If the config leaves ``recompute`` to gradient
                checkpointing, free memory decides between ``"selective"`` and ``"full"``. None:
                there is enough.
            finish: Whether it is a step of the finish, in which rows keep ``finish_retention``.
            fused: Whether loss, norms and MLPs of the stock model are fused (see
                `lemo_hf.planning.fused_rival`).

        Raises:
            ValueError: A value is wrong, or is one whose memory is not predicted.
        """
        check_count("tokens", tokens)
        if tokens > FARTHEST:
            raise ValueError(f"tokens={tokens:,}: rows of up to {FARTHEST:,} are planned.")
        if self.window is not None and self.window < tokens:
            raise ValueError(
                f"the config's sliding_window={self.window} is shorter than {tokens} tokens: "
                "masks of tokens x tokens are not predicted. Plan for rows of at most "
                f"{self.window} tokens, or {MEASURE}"
            )
        if lemo is None and not self._trained.triton:
            raise ValueError(
                "triton=False without a lemo_config is not predicted: where heads share keys, such "
                f"a GPU's attention stores a score for each pair of tokens: {MEASURE}"
            )
        if lemo is not None and lemo.fp8 and not self._trained.triton:
            raise ValueError("fp8=True: a GPU without Triton has no products in FP8: plan without.")
        later = finish and lemo is not None and lemo.finish < 1
        lemo = _of_step(lemo, finish)
        levels = self._model.levels(lemo, tokens, room, later)
        found, pinned, work = self._model.phases(lemo, tokens, levels, fused)
        if lemo is not None and lemo.cuda_graphs:
            work = replace(work, launches=1)
        phases = {phase: parts.total() for phase, parts in found.items()}
        peak = max(phases, key=lambda phase: phases[phase])
        parts = {part: size for part, size in found[peak].items() if size}
        if self._looked is not None:
            self._looked()
        return Plan(parts, peak, phases, levels, pinned, work, fused)

    def plans(self, lemo: LeMoConfig, tokens: int, room: float | None) -> dict[str, Plan]:
        """The plan of each phase of a run that has steps: of ``"sparse"`` and of ``"finish"``.

        Arguments are those of `plan`.
        """
        return {
            name: self.plan(lemo, tokens, room, name == "finish")
            for name in self.phases(lemo, tokens)
        }

    def phases(self, lemo: LeMoConfig, tokens: int) -> list[str]:
        """The phases of a run with rows of ``tokens`` that have steps, of ``"sparse"`` and
        ``"finish"``.

        Under policy ``"auto"`` without a ``dense_finish`` only rows that are labelled throughout
        have a finish.
        """
        labels, finish = self._trained.labels, lemo.finish
        covers_a_part = labels is not None and tokens - labels >= lemo.block_size
        if covers_a_part and lemo.policy == "auto" and lemo.dense_finish is None:
            finish = 0
        there = {"sparse": finish < 1, "finish": finish > 0}
        return [name for name, has_steps in there.items() if has_steps]

    def longest(self, lemo: LeMoConfig | None, room: float, phase: str | None = None) -> int:
        """The longest row that fits into ``room`` bytes.

        The model's ``max_position_embeddings`` is no limit. See `Plan` for what else needs memory.

        Args:
            lemo: Settings of what LeMo leaves out; None: the stock model.
            room: Memory that PyTorch can use, bytes.
            phase: Steps that must fit: ``"sparse"`` or ``"finish"`` of a run, ``"stock"`` or
                ``"fused"`` of the stock model. None: all steps of a run.

        Returns:
            Tokens, a multiple of the block size (of 64 without LeMo), no longer than a sliding
            window or `FARTHEST`; 0 if not even one block fits.
        """
        of_run = None if phase in ("stock", "fused") else lemo
        size = 64 if of_run is None else of_run.block_size

        def beyond(blocks: int) -> float:
            tokens = blocks * size
            if of_run is None:
                peak = self.plan(None, tokens, room, fused=phase == "fused").peak
            elif phase is None:
                peak = max(plan.peak for plan in self.plans(of_run, tokens, room).values())
            else:
                peak = self.plan(of_run, tokens, room, finish=phase == "finish").peak
            return peak - room

        most = min(FARTHEST, self.window or FARTHEST) // size
        return size * _highest(beyond, most, first=(256, 1024))

    def spared(self, lemo: LeMoConfig, tokens: int, room: float) -> LeMoConfig | None:
        """``lemo`` with as many layers that store everything as fit, the last ones; the others
        compute again what is not attention's (``"selective"``). None if not one more fits."""
        layers = len(self._model.layers)

        def mixed(count: int) -> LeMoConfig:
            levels = (UNITS[0],) * (layers - count) + (LEVELS[0],) * count
            return replace(lemo, recompute=levels)

        def beyond(count: int) -> float:
            found = self.plans(mixed(count), tokens, room)
            return max(phase.peak for phase in found.values()) - room

        count = _highest(beyond, layers, first=(layers // 4, layers // 2))
        return mixed(count) if count else None

    def fitting_finish(self, lemo: LeMoConfig, tokens: int, room: float) -> float | None:
        """The highest ``finish_retention``, in hundredths, whose finish fits; None if none does.

        It is no lower than ``retention``.
        """
        kept = lemo.retention
        least = min(kept) if isinstance(kept, tuple) else kept or 0.0

        def beyond(percent: int) -> float:
            config = replace(lemo, finish_retention=max(percent / 100, least))
            return self.plan(config, tokens, room, finish=True).peak - room

        percent = _highest(beyond, 100, first=(100, 50))
        return max(percent / 100, least) if percent else None


def _of_step(lemo: LeMoConfig | None, finish: bool) -> LeMoConfig | None:
    """A config of which every step is like the one that is planned."""
    if lemo is None:
        if finish:
            raise ValueError("finish=True without a lemo_config: the stock model has no finish.")
        return None
    if lemo.sequence_parallel_size > 1:
        raise ValueError(
            f"sequence_parallel_size={lemo.sequence_parallel_size} is not predicted, only steps of "
            f"one GPU: plan with 1, or {MEASURE}"
        )
    if finish:
        own = lemo.mlp_retention is not None or lemo.mlp_threshold is not None
        by_data = lemo.threshold is not None or lemo.mlp_threshold is not None
        lemo = replace(
            lemo,
            retention=lemo.finish_retention,
            mlp_retention=lemo.finish_retention if own else None,
            threshold=None,
            mlp_threshold=None,
            policy="recent" if by_data else lemo.policy,
            fp8=lemo.fp8 and lemo.finish > lemo.bf16_finish,
        )
    elif lemo.bf16_finish == 1:
        lemo = replace(lemo, fp8=False)
    for threshold in (lemo.threshold, lemo.mlp_threshold):
        if threshold is not None:
            raise ValueError(
                f"threshold={threshold} keeps what the data say: plan with the retention that the "
                "logs show (lemo/attention_retention)."
            )
    return replace(lemo, dense_finish=0, finish_retention=1.0)


def _check_config(config: Any) -> None:
    if family_of(config).recurrent is not None:
        raise ValueError(
            f"model_type {config.model_type!r} is not predicted: what its recurrent layers store "
            f"depends on the kernels that are installed for them: {MEASURE}"
        )
    if config.model_type in MULTIMODAL:
        raise ValueError(
            f"model_type {config.model_type!r} is not predicted as a whole: plan its language "
            f"model, config.get_text_config(), and add the other weights, or {MEASURE}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "the config is that of quantised weights: give the unquantised model's, and "
            "load_in_4bit or load_in_8bit."
        )
    implementation, known = getattr(config, "_attn_implementation", None), attention_of(config)
    flash = known == "sdpa" and "flash" in (implementation or "")
    if implementation not in (None, known) and not flash:
        raise ValueError(
            f"attn_implementation={implementation!r} is not predicted: use {known!r}, which stores "
            "no scores."
        )
    # Which attention kernels do not have, so that scores are stored.
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_logit_softcapping"):
        if getattr(config, name, None):
            raise ValueError(
                f"the config's {name}={getattr(config, name)} is not predicted: {MEASURE}"
            )


def _window(config: Any) -> int | None:
    """The longest row that no sliding window cuts, or None."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = getattr(config, "use_sliding_window", True) and "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if slides else None


def _highest(beyond: Callable[[int], float], most: int, first: tuple[int, int]) -> int:
    """The highest number up to ``most`` that is not ``beyond`` (above 0), 0 if there is none.

    ``beyond`` rises, for the most part in a line: tried is where that would cross zero.

    Args:
        beyond: By how much a number is.
        most: Nothing above it is tried.
        first: The two to try first.
    """
    low, high = 0, most + 1
    seen: list[tuple[int, float]] = []
    guess: float
    while high - low > 1:
        if len(seen) < 2:
            guess = first[len(seen)]
        else:
            (x, y), (last, value) = seen[-2:]
            slope = (value - y) / (last - x)
            guess = math.floor(last - value / slope) if slope > 0 else 2 * last
            if len(seen) > 8:  # no line: halves
                guess = (low + high) // 2
        tried = int(min(max(guess, low + 1), high - 1, 4 * low + max(first)))
        seen.append((tried, beyond(tried)))
        low, high = (tried, high) if seen[-1][1] <= 0 else (low, tried)
    return low
