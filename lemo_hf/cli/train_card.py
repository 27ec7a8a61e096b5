"""`lemo train --memory-gib`: settings that fit a card, found by the memory plan before a run."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from lemo_hf.cli.gpu import gpu_here
from lemo_hf.cli.options import RESERVE_GIB, room_of
from lemo_hf.cli.train_config import Settings
from lemo_hf.cli.train_look import Found, look
from lemo_hf.cli.train_model import load_config
from lemo_hf.config import UNITS, LeMoConfig
from lemo_hf.planning.plan import GIB, LOOKS, Plan, Planner
from lemo_hf.planning.speed import Card, step_seconds
from lemo_hf.planning.trained import dtype_of
from lemo_hf.progress import Estimated

PRESET = "card"  # which holds what a card does not decide
OFFLOADS = (8, 16, 32, 64, 128)  # GiB to pin, at most half of the host's memory
Way = tuple[bool, float | None]  # of checkpointing, and GiB of offload
IN = {"finish": " in the finish"}
WORDS = {
    "none": "nothing is computed again",
    "mlp": "MLPs are computed again",
    "selective": "all but attention and its projection is computed again",
    "lean": "all but attention is computed again",
    "full": "layers are computed again as a whole",
}


def plan_for_card(settings: Settings, memory_gib: float, bar: Estimated) -> tuple[Found, str]:
    """Set ``data.tokens``, checkpointing and offload where the user did not.

    The first of these ways that fits is taken: store everything, compute again, compute again and
    offload. Where the second leaves room, as many layers as fit store everything. Without
    ``data.tokens`` rows are as long as the model's positions and sliding window, or shorter if the
    last of the ways allows no more. Attention with sinks becomes the one that is planned:
    transformers' default stores scores.

    Returns:
        What `look` found of the run, and a sentence on what was chosen.

    Raises:
        OSError, ValueError: Nothing fits, the model is one whose memory is not predicted, or
            settings are wrong.
    """
    room = room_of(memory_gib, RESERVE_GIB)
    tokens = settings.values.get("data", {}).get("tokens")
    if tokens is None:
        settings.set("data", "tokens", 2, "--memory-gib")
        if settings.values.get("model", {}).get("rope_type") is not None:
            raise ValueError(
                "model.rope_type stretches positions to the length of a row, which is not known: "
                "give --tokens."
            )
    run = settings.build()
    found = look(run)
    config, start = found.config, run.lemo
    config._attn_implementation = run.model.attn_implementation  # plans refuse some
    asks = start is not None and bool(found.form) and run.data.answers_only
    if start is not None and asks and start.dense_finish is None:
        start = dataclasses.replace(start, dense_finish=0)  # rows that ask have none
    gpu, lora, args = gpu_here(), run.lora, run.training
    common: dict[str, Any] = {
        "batch_size": args.per_device_train_batch_size,
        "lora_rank": None if lora is None else lora.r,
        "lora_targets": None if lora is None else lora.target_modules,
        "dtype": dtype_of(config, "bfloat16") if run.model.dtype == "auto" else run.model.dtype,
        "triton": gpu.triton,
        "capability": gpu.capability,
        "autocast": args.bf16 or args.fp16,
    }
    ways = list(_ways(settings, start))
    planners = {
        checkpointing: Planner(
            config, gradient_checkpointing=checkpointing, looked=bar.update, **common
        )
        for checkpointing in dict.fromkeys(checkpointing for checkpointing, _ in ways)
    }

    def phases_of(way: Way, length: int) -> dict[str, Plan]:
        if start is None:
            return {"stock": planners[way[0]].plan(None, length, room)}
        return planners[way[0]].plans(_offloading(start, way[1]), length, room)

    def fits(phases: dict[str, Plan]) -> bool:
        return all(phase.peak <= room for phase in phases.values())

    def fitting(length: int) -> tuple[Way, dict[str, Plan]] | None:
        """The first way with which rows of ``length`` tokens fit, and its phases."""
        if not fits(last := phases_of(ways[-1], length)):
            return None  # nor by any other, which all store more
        found = ((way, phases_of(way, length)) for way in ways[:-1])
        return next((x for x in found if fits(x[1])), (ways[-1], last))

    asked, planner = tokens, next(iter(planners.values()))
    window = planner.window
    positions = config.get_text_config().max_position_embeddings
    tokens = tokens or min(positions, window or positions)
    bar.expect(2 * len(ways))
    chosen = fitting(tokens)
    if chosen is None:
        checkpointing, offload = ways[-1]
        lemo = None if start is None else _offloading(start, offload)
        bar.expect(2 * (LOOKS + len(ways)))
        most = planners[checkpointing].longest(lemo, room)
        chosen = fitting(most) if most and asked is None else None
        if chosen is None:
            raise ValueError(
                f"--memory-gib {memory_gib:g}: rows of {tokens:,} tokens do not fit; the longest "
                f"that fit have {most:,}. Ask for shorter rows, a lower retention, or a larger "
                "card."
            )
        tokens = most
    if asked is None:
        settings.set("data", "tokens", tokens, "--memory-gib")
    (checkpointing, offload), phases = chosen
    if start is not None and _may_spare(settings, start, chosen):
        bar.expect(2 * LOOKS)
        spared = planners[checkpointing].spared(start, tokens, room)
        if spared is not None:
            phases = planners[checkpointing].plans(spared, tokens, room)
            settings.set("lemo", "recompute", spared.recompute, "--memory-gib")
    settings.set("training", "activation_checkpointing", checkpointing, "--memory-gib")
    by = ""
    if run.model.attn_implementation is None and planner.attention != "sdpa":
        by = f", attention is {planner.attention}"
        settings.set("model", "attn_implementation", planner.attention, "--memory-gib")
    if offload is not None:
        settings.set("lemo", "offload_gib", offload, "--memory-gib")
    highest = max(phases.values(), key=lambda phase: phase.peak)
    levels = _in_words(highest.levels)
    levels = levels or ("layers are computed again" if checkpointing else WORDS["none"])
    pinned = "" if offload is None else f", up to {offload:g} GiB wait in pinned host memory"
    cut = asked is None and tokens == window
    why = " (as the model's sliding window; longer ones are not predicted)" if cut else ""
    said = (
        f"Planned for {memory_gib:g} GiB, {RESERVE_GIB:g} of them left to CUDA: rows of {tokens:,} "
        f"tokens{why}; {levels}{pinned}{by}. The predicted peak is {highest.peak / GIB:.1f} GiB."
    )
    if asks:  # their lengths are not known before TRL has tokenised all rows
        said += (
            " Answers that are a larger share of their row than lemo.retention are kept whole, "
            "which takes more memory and time than planned."
        )
    if gpu.card is not None:
        said += f" {_times(phases, gpu.card, args.gradient_accumulation_steps)}"
    longer = load_config(settings.build().model, tokens)
    return dataclasses.replace(found, config=longer), said


def _may_spare(settings: Settings, lemo: LeMoConfig, chosen: tuple[Way, dict[str, Plan]]) -> bool:
    """Whether layers that are computed again may store everything instead, as far as they fit."""
    way, phases = chosen
    said = settings.values.get("training", {}).get("activation_checkpointing")
    if way != (True, None) or said is not None or lemo.recompute is not None:
        return False
    return {level for phase in phases.values() for level in phase.levels} == {UNITS[0]}


def _in_words(levels: Sequence[str]) -> str:
    """What is computed again, and in how many layers, if the first differ from the last."""
    runs = [(level, len(list(same))) for level, same in groupby(levels)]
    if len(runs) != 2:
        return " and ".join(WORDS[level] for level in dict.fromkeys(levels))
    (first, many), (last, rest) = runs
    return f"in the first {many} layers {WORDS[first]}, in the last {rest} {WORDS[last]}"


def _times(phases: dict[str, Plan], card: Card, passes: int) -> str:
    """How long optimizer steps of so many passes take."""
    times = [
        f"{1e3 * passes * step_seconds(phase, card):,.0f} ms{IN.get(name, '')}"
        for name, phase in phases.items()
    ]
    return f"An optimizer step takes about {', '.join(times)}. {card.said}"


def _offloading(lemo: LeMoConfig, gib: float | None) -> LeMoConfig:
    return lemo if gib is None else dataclasses.replace(lemo, offload_gib=gib)


def _ways(settings: Settings, lemo: LeMoConfig | None) -> Iterator[Way]:
    """Ways of checkpointing and offload that may be chosen, the fastest first."""
    said = settings.values.get("training", {}).get("activation_checkpointing")
    yield from ((way, None) for way in (False, True) if said in (None, way))
    if lemo is None or lemo.offload_gib is not None or lemo.cuda_graphs or said is False:
        return
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    yield from ((True, float(gib)) for gib in OFFLOADS if gib <= host / 2)
