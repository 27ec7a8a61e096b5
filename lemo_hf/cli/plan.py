"""`lemo plan`."""

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lemo_hf.cli.idle import refuse_idle
from lemo_hf.cli.options import (
    RESERVE_GIB,
    AsJson,
    DType,
    Dtype,
    Model,
    TrustRemoteCode,
    prepared_config,
    room_of,
)
from lemo_hf.config import LeMoConfig
from lemo_hf.progress import Estimated

if TYPE_CHECKING:
    from lemo_hf.planning.plan import Plan

GIB = 2**30
COLUMNS = {"sparse": "LeMo", "finish": "finish", "stock": "without", "fused": "fused"}


def plan(
    context: typer.Context,
    model: Model,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 32768,
    memory_gib: Annotated[
        float | None, typer.Option(help="Of the GPU: says whether it fits, and what would.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="h200, h100, a100 or l40s, whose times are predicted too; v100 or t4, which have "
            "no kernels of Triton. Default: the one here."
        ),
    ] = None,
    reserve_gib: Annotated[
        float, typer.Option(help="Of that, for the CUDA context and fragmentation.")
    ] = RESERVE_GIB,
    labels: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a row with a label, the last ones. Default: all."),
    ] = None,
    retention: Annotated[
        float | None, typer.Option(help="Share of the tokens each layer keeps. Default: 0.3.")
    ] = None,
    dense_finish: Annotated[
        float | None,
        typer.Option(
            help="Share of the steps, at the end, that keep everything; 0: none. Default: 0.1, for "
            "rows that are labelled throughout."
        ),
    ] = None,
    finish_retention: Annotated[
        float | None, typer.Option(help="What these steps keep, if not everything.")
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
        typer.Option(help="Linears with LoRA, or all-linear; repeatable. Default: attention's."),
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
    """Predict a step's peak memory, part by part, and its time, from the model's config alone."""
    if config is not None and retention is not None:
        raise ValueError("--config brings its own retention: leave out --retention.")
    start = LeMoConfig() if config is None else LeMoConfig.from_pretrained(config)
    given = {
        "retention": retention,
        "dense_finish": dense_finish,
        "finish_retention": finish_retention,
        "recompute": recompute,
        "offload_gib": offload_gib,
    }
    if labels is not None and labels > tokens:
        raise ValueError(f"--labels {labels}: a row has {tokens} tokens, by --tokens.")
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    lemo = dataclasses.replace(start, **changes)
    if lemo.offload_gib is not None and lemo.recompute is None and not gradient_checkpointing:
        raise ValueError(
            f"--offload-gib {lemo.offload_gib:g} moves what recomputed layers store, and none is: "
            "give --gradient-checkpointing, or --recompute selective, lean or full."
        )
    from lemo_hf.cli.gpu import gpu_called, gpu_here
    from lemo_hf.planning.plan import LOOKS, Planner
    from lemo_hf.planning.speed import step_seconds
    from lemo_hf.planning.trained import dtype_of

    if memory_gib is None:
        refuse_idle(context, "without --memory-gib", ["reserve_gib"])
    if not lora_rank:
        refuse_idle(context, "with --lora-rank 0", ["lora_target"])
    if not (load_in_4bit or load_in_8bit):
        refuse_idle(context, "without --load-in-4bit or --load-in-8bit", ["kbit_training"])
    room = None if memory_gib is None else room_of(memory_gib, reserve_gib, may_lower=True)
    of = gpu_here() if gpu is None else gpu_called(gpu)
    card = of.card
    if card is not None and (load_in_4bit or load_in_8bit):
        if gpu is not None:
            raise ValueError(
                "--gpu: times of quantised weights are not predicted, none was measured."
            )
        card = None
    prepared = prepared_config(model, trust_remote_code=trust_remote_code)
    kind = dtype.value
    if dtype is DType.auto:
        kind = dtype_of(prepared, "bfloat16") if of.triton else "float16"
    settings: dict[str, Any] = {
        "batch_size": batch_size,
        "lora_rank": lora_rank or None,
        "lora_targets": lora_target,
        "dtype": kind,
        "autocast": autocast and kind != "float32",
        "load_in_4bit": load_in_4bit,
        "load_in_8bit": load_in_8bit,
        "kbit_training": kbit_training,
        "gradient_checkpointing": gradient_checkpointing,
        "labels": labels,
        "triton": of.triton,
        "capability": of.capability,
    }
    planner = Planner(prepared, looked=lambda: bar.update(), **settings)
    if "finish" not in planner.phases(lemo, tokens):
        way_out = "set --dense-finish, or leave it out"
        refuse_idle(context, "where there is no finish", ["finish_retention"], way_out=way_out)
    targets = planner.targets
    settings["lora_targets"] = "all-linear" if targets == ["all-linear"] else targets
    with Estimated(desc="planned steps", unit="step", leave=False, disable=as_json) as bar:
        bar.expect(4 if room is None else 4 + 5 * LOOKS)
        found = planner.plans(lemo, tokens, room)
        if of.triton:
            found["stock"] = planner.plan(None, tokens, room)
            found["fused"] = planner.plan(None, tokens, room, fused=True)
        result: dict[str, Any] = {"model": model, "tokens": tokens, **settings}
        result["attention"] = planner.attention
        if of.title is not None:
            result["gpu"] = of.title
        for number, (name, phase) in enumerate(found.items()):
            entry = {"peak": phase.peak, "phase": phase.phase, "parts": phase.parts}
            entry |= {"recompute": list(phase.levels), "pinned": phase.pinned}
            if memory_gib is not None and room is not None:
                entry["fits"] = phase.fits(memory_gib - reserve_gib)
                bar.expect((len(found) - number + 1) * LOOKS)
                entry["longest"] = planner.longest(lemo, room, name)
            if card is not None:
                seconds = step_seconds(phase, card)
                entry["step_ms"] = round(1e3 * seconds, 1)
                entry["tokens_per_s"] = round(batch_size * tokens / seconds)
            result[COLUMNS[name]] = entry
        fits = {name: result[COLUMNS[name]].get("fits") for name in found}
        if room is not None and fits.get("sparse") and fits.get("finish") is False:
            bar.expect(LOOKS)
            result["fitting_finish"] = planner.fitting_finish(lemo, tokens, room)
    if as_json:
        print(json.dumps(result))
        return
    _print_table(found, result, memory_gib)
    if planner.attention != "sdpa":
        print(
            f"All columns have attn_implementation={planner.attention!r}, which LeMo brings; with "
            "'eager', transformers' default for this model, each would take more memory: a score "
            "for each pair of tokens."
        )
    from lemo_hf.describe import describe_products

    if said := describe_products(lemo).strip():
        print(said)
    if card is not None:
        print(card.said)
    if not of.triton:
        print(
            f"An {of.title} has no kernels of Triton and no bfloat16: planned are PyTorch's "
            "operators, and nothing was measured on such a card. The model without LeMo is not "
            "planned: where heads share keys, PyTorch stores a score for each pair of tokens there."
        )
    if "finish" in found:
        print(_on_phases(lemo, result))


def _print_table(
    found: dict[str, "Plan"], result: dict[str, Any], memory_gib: float | None
) -> None:
    """A column for each phase, and two for the stock model."""
    names = [COLUMNS[name] for name in found]
    phases = found.values()
    size, unit, digits = _unit(min(phase.peak for phase in phases))
    lines = [[unit, *names]]
    for part in dict.fromkeys(part for phase in phases for part in phase.parts):
        lines.append([part, *(f"{phase.parts.get(part, 0) / size:.{digits}f}" for phase in phases)])
    lines.append(["peak", *(f"{phase.peak / size:.{digits}f}" for phase in phases)])
    lines.append(["reached in", *(phase.phase for phase in phases)])
    lines.append(["recomputed", *("/".join(dict.fromkeys(x.levels)) or "-" for x in phases)])
    if any(phase.pinned for phase in phases):
        lines.append(
            ["pinned host memory", *(f"{phase.pinned / size:.{digits}f}" for phase in phases)]
        )
    if "step_ms" in result[names[0]]:
        for title, key in (("step, ms", "step_ms"), ("tokens a second", "tokens_per_s")):
            lines.append([title, *(f"{result[name][key]:,.0f}" for name in names)])
    if memory_gib is not None:
        from lemo_hf.planning.plan import FARTHEST

        fits = ["yes" if result[name]["fits"] else "no" for name in names]
        lines.append([f"fits into {memory_gib:g} GiB", *fits])
        longest = [result[name]["longest"] for name in names]
        far = ["at least " if tokens >= FARTHEST else "" for tokens in longest]
        cells = [f"{word}{tokens:,}" for word, tokens in zip(far, longest, strict=True)]
        lines.append(["longest row", *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]))


def _unit(peak: int) -> tuple[int, str, int]:
    """Bytes, name and digits of the unit in which the lowest peak has figures that say much."""
    return (GIB, "GiB", 2) if peak >= GIB / 10 else (2**20, "MiB", 1)


def _on_phases(lemo: LeMoConfig, result: dict[str, Any]) -> str:
    """In plain words: what the finish is, which phase sets the peak, and what would fit."""
    from lemo_hf.describe import describe_finish

    said = describe_finish(lemo)
    finish, sparse = result["finish"], result.get("LeMo")
    if sparse is None:
        return f"{said}There are no other steps."
    ends = finish["peak"] > sparse["peak"]
    high, low = ("finish", "sparse steps") if ends else ("sparse steps", "finish")
    size, unit, digits = _unit(min(x["peak"] for x in (finish, sparse)))
    high_peak, low_peak = (
        f"{x['peak'] / size:.{digits}f}" for x in ((finish, sparse) if ends else (sparse, finish))
    )
    verb, other = ("sets", "take") if ends else ("set", "takes")
    said += f"The {high} {verb} the peak, {high_peak} {unit}; the {low} {other} {low_peak}."
    if "fits" in finish:
        rows = min(finish["longest"], sparse["longest"])
        said += f" Both fit with rows of up to {rows:,} tokens."
    if result.get("fitting_finish") is not None:
        share, tokens = result["fitting_finish"], result["tokens"]
        said += f" With --finish-retention {share:g} the finish fits rows of {tokens:,} as well."
    if lemo.dense_finish is None and result["labels"] is None:
        said += " Rows whose labels cover a part of them have none: "
        said += "give the number of labels as --labels."
    return said
