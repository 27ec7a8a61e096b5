"""Tables of whole steps and of the longest sequences."""

import statistics

from providers import LEMO

GROUPS = {
    "plain": "No checkpointing",
    "checkpointing": "Checkpointing",
    "axolotl": "Axolotl's selective checkpointing",
    "stored": "Layers that fit store everything",
    "offload": "Offload to pinned host memory",
    "growth": "Growth (one round; memory in italics is a dry step's)",
    "short": "Short rows, no checkpointing",
    "fp8": "Products with frozen weights in FP8",
    "paper": "The paper's protocol, no checkpointing",
}
NAMES = {
    "hf": "HF + PEFT",
    "liger": "Liger + PEFT",
    "s2attn": "LongLoRA's S²-Attn",
    "lemo": "LeMo",
    "lemo-all": "LeMo, no dense layer",
    "lemo-all-0.3": "LeMo, no dense layer",
    "lemo 0.3": "LeMo",
    "lemo 0.1": "LeMo",
    "graph": "CUDA graphs",
    "some-stored": "24 layers store everything",
    "most-stored": "28 layers store everything",
    "some-mlp": "MLPs of 14 layers again",
    "mlp": "MLPs again",
    "selective": "all but attention again",
    "some-offload": "offload of 8 GiB",
    "some-offload-uniform": "offload of 8 GiB, as much from each layer",
    "transformers-offload": "transformers' own offload",
    "axolotl": "Axolotl's selective checkpointing",
}
PACKAGES = ("torch", "triton", "transformers", "peft")


def markdown(lines: list[list[str]]) -> str:
    """Rows of cells, the first of them the head, as a table."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])


def name_of(provider: str) -> str:
    """A provider in words."""
    base, *rest = provider.split("+")
    return " + ".join(NAMES.get(part, part) for part in (base, *rest))


def length(tokens: int) -> str:
    """``8192`` as ``8K``."""
    return f"{tokens:,}" if tokens % 1024 else f"{tokens // 1024:,}K"


def labels_of(row: dict, labels: int | None = None) -> float:
    """Tokens of a row that have a loss: ``labels``, or without them all that are kept."""
    return labels or row["tokens"] * (row["retention"] or 1)


def rate(count: float, ms: float) -> str:
    """A second."""
    return f"{count / ms * 1e3:,.0f}"


def status_of(row: dict) -> str:
    """Why there is no number."""
    status = row["status"]
    if status == "oom":
        return "out of memory"
    if status.startswith("not run: OOM at "):
        return f"out of memory from {length(int(status.rsplit(' ', 1)[1]))} on"
    return "not timed" if status.startswith("not run") else status.partition(":")[0]


def step_row(row: dict, lemo: dict | None) -> list[str]:
    """One line: what the step takes, and how far LeMo is ahead of it."""
    retention = "1" if row["retention"] is None else f"{row['retention']:g}"
    if row["config"] is not None and row["config"]["dense_first_layers"]:
        retention += f" after layer {row['config']['dense_first_layers']}"
    cells = [row["model"], length(row["tokens"]), name_of(row["provider"]), retention]
    if row["status"] != "ok":
        peak = f"*{row['dry_peak_gib']:.1f}*" if "dry_peak_gib" in row else ""
        return [*cells, status_of(row), "", "", peak, "", "", "", "", ""]
    pinned = f"{row['dry_host_gib']:.1f}" if row.get("dry_host_gib") else ""
    # Operations in FP8 are not counted.
    counted = "share_of_matmul" in row and not (row["config"] or {}).get("fp8")
    share = f"{row['share_of_matmul']:.0%}" if counted else ""
    ahead = ["", "", ""]
    if lemo is not None and row is not lemo:
        faster = row["ms_median"] / lemo["ms_median"]
        ahead = [
            f"{faster:.2f}×",
            f"{faster * labels_of(lemo) / labels_of(row):.2f}×",
            f"{row['peak_gib'] / lemo['peak_gib']:.2f}×",
        ]
    return [
        *cells,
        f"{row['ms_median']:,.0f}",
        rate(row["tokens"], row["ms_median"]),
        rate(labels_of(row), row["ms_median"]),
        f"{row['peak_gib']:.1f}",
        pinned,
        share,
        *ahead,
    ]


def step_tables(header: dict, rows: list[dict]) -> str:
    """Markdown: a table a group, the conditions and the commands."""
    parts = []
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        lines = [["model", "tokens", "step", "retention", "ms", "tokens/s", "labels/s"]]
        lines[0] += ["peak GiB", "pinned GiB", "of matmul peak"]
        lines[0] += ["LeMo is faster", "in labels/s", "LeMo is smaller"]
        for row in own:
            same = [x for x in own if (x["model"], x["tokens"]) == (row["model"], row["tokens"])]
            lemo = [x for x in same if x["provider"].startswith("lemo") and x["status"] == "ok"]
            lines.append(step_row(row, lemo[0] if lemo else None))
        parts += [f"**{GROUPS.get(group, group)}**", markdown(lines)]
    commands = "\n".join(dict.fromkeys(row["command"] for row in rows))
    return "\n\n".join([*parts, step_conditions(header, rows), f"```bash\n{commands}\n```"])


def step_conditions(header: dict, rows: list[dict]) -> str:
    """GPU, versions, commit, and what columns mean."""
    versions = ", ".join(f"{name} {header[name]}" for name in PACKAGES)
    checked = [
        abs(row["dry_peak_gib"] / row["peak_gib"] - 1)
        for row in rows
        if row["status"] == "ok" and row.get("dry_peak_gib")
    ]
    dry = f" Dry steps' peaks differ from these by at most {max(checked):.1%}." if checked else ""
    return (
        f"{header['gpu']}, {versions}, commit `{header['commit']}`, {header['date']}, allocator "
        f"{header['allocator']}. Medians; LoRA r = {header['lora']['r']} in "
        f"{header['lora_dtype']} on q, k, v and o, AdamW fused. *Of matmul peak*: operations of "
        "the step's matrix products and attention (recomputation counted, the half of a causal "
        f"square) by its time, against {header['matmul_tflops']:.0f} TFLOP/s of an 8192³ bf16 "
        "product in the same run. *Tokens/s* counts all tokens of a row, *labels/s* those with a "
        "loss, which are LeMo's kept ones. *LeMo is*: the first LeMo row of that length against "
        f"this one, by time, by labels/s, by memory.{dry}"
    )


OPTIONS = {"graph": "cuda_graphs", "fp8": "fp8", "mlp": 'recompute="mlp"'}
WEIGHTS = {"nf4": "4 bits (NF4, double quantisation)", "int8": "8 bits (LLM.int8)"}


def longest_table(rows: list[dict]) -> str:
    """Markdown: longest lengths by cap."""
    found = [row for row in rows if row["part"] == "longest"]
    caps = list(dict.fromkeys(row["cap"] for row in found))
    heads = [("whole card" if cap == "whole" else f"{cap} GiB") for cap in caps]
    lines = [["step", "retention", *heads]]
    cells = {(row["provider"], row["cap"]): longest_cell(row) for row in found}
    kept = {row["provider"]: row["retention"] or 1 for row in found}
    for provider, retention in kept.items():
        values = [cells.get((provider, cap), "not run") for cap in caps]
        lines.append([name_of(provider), f"{retention:g}", *values])
    return markdown(lines)


def longest_tables(header: dict, rows: list[dict]) -> str:
    """Markdown: longest lengths by cap, real steps, how good dry steps are."""
    found = [row for row in rows if row["part"] == "longest"]
    parts = [longest_table(rows)]
    real = [row for row in rows if row["part"] == "real"]
    if real:
        lines = [["real step", "retention", "tokens", "cap", "s", "tokens/s", "labels/s"]]
        lines[0].append("peak GiB")
        lines += [real_row(row, header.get("labels")) for row in real]
        parts.append(markdown(lines))
    off = [abs(row["off"]) for row in rows if row["part"] == "verify" and "off" in row]
    if off:
        parts.append(
            f"Found by dry steps, whose peaks differ from real ones by at most {max(off):.1%} in "
            f"{len(off)} comparisons of the same run."
        )
    versions = ", ".join(f"{name} {header[name]}" for name in PACKAGES)
    guesses = [
        abs(row["planned_longest"] / row["fits"] - 1)
        for row in found
        if row.get("planned_longest") and row["provider"].startswith("lemo")
    ]
    if guesses:
        parts.append(
            f"`lemo plan` expected LeMo's lengths within {max(guesses):.1%} (lengths were tried "
            "in steps of 4K, up to one that fits while 4 % more do not)."
        )
    commands = "\n".join(header["commands"])
    note = f" Note: {header['note']}." if "note" in header else ""
    base = base_text(header)
    if "labels" in header:
        base += f", labels on the last {header['labels']} tokens of a row"
    parts.append(
        f"{header['model']} shapes{base}, {header['gpu']}, {versions}, "
        f"commit `{header['commit']}`, "
        f"{header['date']}, allocator {header['allocator']}; caps by "
        f"`set_per_process_memory_fraction`; at most {header['host_limit_gib']:.0f} GiB of host "
        f"memory pinned.{note}\n\n```bash\n{commands}\n```"
    )
    return "\n\n".join(parts)


def base_text(header: dict) -> str:
    """How weights are held and what is trained, where it is not bf16 and the usual LoRA."""
    name = header.get("base", "")
    parts = [f", weights in {text}" for key, text in WEIGHTS.items() if name.startswith(key)]
    if "kbit-training" in name:
        parts.append(", the others in fp32")
    if "wide" in name:
        parts.append(f", LoRA r = {header['lora']['r']} on all linears")
    return "".join(parts)


def longest_cell(row: dict) -> str:
    """The longest length that fits, and what stops the next."""
    fits = length(row["fits"]) if row["fits"] else "none"
    if row["too_long"] is None:
        return f"≥ {fits}"
    why = {"oom": "out of memory"}.get(row["limit"], row["limit"].partition(":")[0])
    return f"{fits} ({why} at {length(row['too_long'])})"


def real_row(row: dict, labels: int | None) -> list[str]:
    """One real step; ``labels`` as for `labels_of`."""
    head = [name_of(row["provider"]), f"{row['retention'] or 1:g}", length(row["tokens"])]
    head.append("whole card" if row["cap"] == "whole" else f"{row['cap']} GiB")
    if row["status"] != "ok":
        return [*head, status_of(row), "", "", ""]
    ms = row["ms_median"]
    speed = [rate(row["tokens"], ms), rate(labels_of(row, labels), ms)]
    return [*head, f"{ms / 1e3:,.1f}", *speed, f"{row['peak_gib']:.1f}"]


def scaling_table(header: dict, rows: list[dict]) -> str:
    """Markdown: steps by Trainer and LeMoTrainer on one and more GPUs, and longest sequences."""
    names = {"hf": "Trainer", "lemo": "LeMoTrainer"}
    titles = ["engine", "tokens a row", "GPUs", "by", "ms", "tokens/s", "labels/s"]
    lines = [[*titles, "efficiency", "NCCL ms", "peak GiB"]]
    timed = [row for row in rows if row["group"] != "longest"]
    for row in sorted(timed, key=lambda r: (r["engine"], r["tokens"], r["provider"], r["gpus"])):
        engine = "shared sequence" if row["engine"] == "sequence" else row["engine"].upper()
        line = [engine, f"{row['tokens']:,}", str(row["gpus"]), names[row["provider"]]]
        if row["status"] == "ok":
            trained = LEMO["retention"] if row["provider"] == "lemo" else 1
            speed = row["tokens_per_s"], row["tokens_per_s"] * trained
            line += [f"{row['ms_median']:,.0f}", *(f"{x:,.0f}" for x in speed)]
            line.append(f"{row['efficiency']:.1%}" if "efficiency" in row else "")
            line += ["" if row["nccl_ms"] is None else f"{row['nccl_ms']:.0f}"]
            line.append(f"{row['peak_gib']:.1f}")
        else:
            line += [row["status"], "", "", "", "", ""]
        lines.append(line)
    parts = [markdown(lines)]
    longest = [row for row in rows if row["group"] == "longest"]
    if longest:
        lines = [["longest shared sequence", "GPUs", "tokens", "against one GPU"]]
        for row in sorted(longest, key=lambda r: (r["cap_gib"], r["gpus"])):
            times = f"{row['longer']:.2f}×" if "longer" in row else ""
            cap = f"{row['cap_gib']:g} GiB a GPU"
            lines.append([cap, str(row["gpus"]), f"{row['tokens']:,}", times])
        parts.append(markdown(lines))
    parts.append(
        f"{header['model']} shapes, {header['gpu']}, torch {header['torch']}, "
        f"transformers {header['transformers']}, accelerate {header['accelerate']}, commit "
        f"`{header['commit']}`, {header['date']}, `benchmarks/bench_scaling.py`."
    )
    return "\n\n".join(parts)


def completion_table(header: dict, rows: list[dict], short: bool = False) -> str:
    """Rows whose last tokens alone are labels.

    ``short`` leaves out other policies than the default, and options without CUDA graphs.
    """
    columns = ["rows", "step", "ms", "tokens/s", "labels/s", "peak GiB", "of it choosing, ms"]
    lines = [columns]
    for row in rows:
        provider, _, policy = row["provider"].removeprefix("lemo ").partition(" ")
        options = policy.strip("+").split("+") if policy.startswith("+") else []
        if short and policy and "graph" not in options:
            continue
        name = name_of(provider) if row["lemo"] is None else f"LeMo, retention {provider}"
        policy = ", ".join(f"`{OPTIONS[x]}`" for x in options) or (policy and f"`{policy}`")
        name += policy and f", {policy}"
        count = row.get("rows", 1)
        cells = [f"{count} × {length(row['tokens'])}", name]
        if row["status"] == "ok":
            choosing = "" if "choosing_ms" not in row else f"{row['choosing_ms']:.1f}"
            speed = [count * x / row["ms_median"] * 1e3 for x in (row["tokens"], header["labels"])]
            cells += [f"{row['ms_median']:,.0f}", *(f"{x:,.0f}" for x in speed)]
            cells += [f"{row['peak_gib']:.1f}", choosing]
        else:
            cells += [status_of(row), "", "", "", ""]
        lines.append(cells)
    versions = ", ".join(f"{name} {header[name]}" for name in PACKAGES)
    return (
        f"{markdown(lines)}\n\n{header['gpu']}, {rows[0]['model']} shapes, "
        f"{header['labels']} labels a row, LoRA r = 8 on q, k, v, o, bf16; {versions}, "
        f"commit `{header['commit']}`, "
        f"{header['date']}, `benchmarks/bench_completion.py`."
    )


def trainer_table(header: dict, rows: list[dict]) -> str:
    """Steps of completion rows in a loop and by trainers."""
    lines = [["model", "rows", "LeMo", "by", "ms", "least and most", "peak GiB"]]
    for row in rows:
        provider, _, options = row["provider"].removeprefix("lemo ").partition(" +")
        name = f"retention {provider}" + "".join(f", `{OPTIONS[x]}`" for x in options.split() if x)
        cells = [row["model"], f"{row['rows']} × {length(row['tokens'])}", name, row["way"]]
        if row["status"] == "ok":
            low, high = min(row["ms"]), max(row["ms"])
            cells += [f"{statistics.median(row['ms']):,.1f}", f"{low:,.1f} to {high:,.1f}"]
            cells += [f"{row['peak_gib']:.1f}"]
        else:
            cells += [status_of(row), "", ""]
        lines.append(cells)
    versions = ", ".join(f"{name} {header[name]}" for name in PACKAGES)
    commands = "\n".join(header["commands"])
    return (
        f"{markdown(lines)}\n\n{header['gpu']}, {header['labels']} labels a row, LoRA r = "
        f"{header['lora']['r']} on q, k, v, o, AdamW fused; {versions}, commit "
        f"`{header['commit']}`, {header['date']}. Medians of {len(rows[0]['ms'])} runs in turn, of "
        f"which {header['steps']} steps or more are timed together.\n\n```bash\n{commands}\n```"
    )
