"""`lemo plan`."""

import dataclasses
import json
from typing import Annotated, Any

import typer

from lemo_hf.cli.options import AsJson, DType, Dtype, Model, TrustRemoteCode
from lemo_hf.config import LeMoConfig


def plan(
    model: Model,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 32768,
    memory_gib: Annotated[
        float | None, typer.Option(help="Of the GPU: says whether it fits, and what would.")
    ] = None,
    reserve_gib: Annotated[
        float, typer.Option(help="Of that, for the CUDA context and fragmentation.")
    ] = 2.0,
    retention: Annotated[
        float | None, typer.Option(help="Share of the tokens each layer keeps. Default: 0.5.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="Instead: directory or Hub id of a lemo_config.json.")
    ] = None,
    recompute: Annotated[
        str | None,
        typer.Option(
            help="none, mlp, selective, lean or full. Default: as gradient checkpointing says."
        ),
    ] = None,
    offload_gib: Annotated[
        float | None, typer.Option(help="Pinned host memory for what layers store.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 1,
    lora_rank: Annotated[int, typer.Option(min=0, help="Of LoRA; 0 trains all parameters.")] = 8,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(help="Linears with LoRA, or all-linear; repeatable. Default: q, k, v, o."),
    ] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Linears in NF4 with double quantisation.")
    ] = False,
    load_in_8bit: Annotated[
        bool, typer.Option("--load-in-8bit", help="Linears in LLM.int8's 8 bits.")
    ] = False,
    kbit_training: Annotated[
        bool,
        typer.Option(
            help="With these: PEFT's prepare_model_for_kbit_training makes the rest fp32."
        ),
    ] = True,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Store kept rows, compute again.")
    ] = False,
    autocast: Annotated[bool, typer.Option(help="As TrainingArguments(bf16=True).")] = True,
    dtype: Dtype = DType.auto,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Predict the peak memory of a training step, part by part, from the model's config alone."""
    if config is not None and retention is not None:
        raise ValueError("--config brings its own retention: leave out --retention.")
    start = LeMoConfig() if config is None else LeMoConfig.from_pretrained(config)
    given = {"retention": retention, "recompute": recompute, "offload_gib": offload_gib}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    lemo = dataclasses.replace(start, **changes)

    from transformers import AutoConfig

    from lemo_hf.plan import GIB, longest
    from lemo_hf.plan import plan as predict

    model_config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    targets: Any = lora_target or ("q_proj", "k_proj", "v_proj", "o_proj")
    if list(targets) == ["all-linear"]:
        targets = "all-linear"
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "lora_rank": lora_rank or None,
        "lora_targets": targets,
        "dtype": "bfloat16" if dtype is DType.auto else dtype.value,
        "autocast": autocast and dtype is not DType.float32,
        "load_in_4bit": load_in_4bit,
        "load_in_8bit": load_in_8bit,
        "kbit_training": kbit_training,
        "gradient_checkpointing": gradient_checkpointing,
    }
    room: dict[str, Any] = {"memory_gib": memory_gib, "reserve_gib": reserve_gib}
    plans = {
        name: predict(model_config, what, tokens, **settings, **room)
        for name, what in (("LeMo", lemo), ("without", None))
    }
    result: dict[str, Any] = {"model": model, "tokens": tokens, **settings}
    for name, found in plans.items():
        result[name] = {"peak": found.peak, "phase": found.phase, "parts": found.parts}
        result[name] |= {"recompute": list(found.levels), "pinned": found.pinned}
        if memory_gib is not None:
            what = lemo if name == "LeMo" else None
            result[name] |= {
                "fits": found.fits(memory_gib - reserve_gib),
                "longest": longest(model_config, what, **settings, **room),
            }
    if as_json:
        print(json.dumps(result))
        return
    names = list(dict.fromkeys(part for found in plans.values() for part in found.parts))
    lines = [["GiB", *plans]]
    for part in names:
        sizes = [found.parts.get(part, 0) / GIB for found in plans.values()]
        lines.append([part, *(f"{size:.2f}" for size in sizes)])
    lines.append(["peak", *(f"{found.peak / GIB:.2f}" for found in plans.values())])
    lines.append(["reached in", *(found.phase for found in plans.values())])
    levels = {name: "/".join(dict.fromkeys(found.levels)) or "-" for name, found in plans.items()}
    lines.append(["recomputed", *levels.values()])
    if any(found.pinned for found in plans.values()):
        pinned = [f"{found.pinned / GIB:.2f}" for found in plans.values()]
        lines.append(["pinned host memory", *pinned])
    if memory_gib is not None:
        fits = ["yes" if result[name]["fits"] else "no" for name in plans]
        lines.append([f"fits into {memory_gib:g} GiB", *fits])
        lines.append(["longest row", *(f"{result[name]['longest']:,}" for name in plans)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]))
