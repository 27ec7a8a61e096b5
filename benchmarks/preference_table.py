"""The tables of DPO and of models whose layers pass a state on."""

from step_table import markdown

NAMES = {"trl": "TRL", "trl+liger": "TRL + Liger"}


def preference_table(header: dict, rows: list[dict]) -> str:
    """DPO steps: time, and memory with and without what the weights take."""
    trl = next((row for row in rows if row["provider"] == "trl" and row["status"] == "ok"), None)
    lines = [["step", "ms", "TRL / this", "peak GiB"]]
    order = sorted(rows, key=lambda row: -row.get("ms_median", 0))
    for row in order:
        _, _, share = row["provider"].partition(" ")
        name = NAMES.get(row["provider"]) or f"LeMo, retention {share}"
        if row["status"] != "ok":
            lines.append([name, row["status"], "", ""])
            continue
        faster = "" if trl is None else f"{trl['ms_median'] / row['ms_median']:.1f}×"
        lines.append([name, f"{row['ms_median']:,.0f}", faster, f"{row['peak_gib']:.1f}"])
    first = rows[0]
    return (
        f"{markdown(lines)}\n\n{header['gpu']}, {first['model']} shapes, one prompt of "
        f"{first['prompt']:,} tokens with two completions of {first['completion']:,}, LoRA "
        f"r = {header['lora']['r']} on q, k, v, o, gradient checkpointing, bf16; TRL "
        f"{header['trl']}, transformers {header['transformers']}, torch {header['torch']}, commit "
        f"`{header['commit']}`, {header['date']}, `benchmarks/bench_preference.py`."
    )


def preference_quality_table(header: dict, rows: list[dict]) -> str:
    """Right answers of the preference task after equal times."""
    titles = ["", "pairs a step", "seed", "held-out pairs right", "for", "pairs trained"]
    lines = [[*titles, "peak GiB"]]
    for row in rows:
        share = f"{100 * row['accuracy']:.1f} %"
        if row["way"] == "base":
            lines.append(["before training", "", "", share, "", "", ""])
            continue
        kind, _, kept = row["way"].partition(" ")
        names = {"lemo": f"LeMo, {kept}", "cut": f"prompts cut to {kept} (TRL)"}
        name = names.get(kind, "dense (TRL)")
        took, pairs = f"{row['seconds']:.0f} s", str(row["batch"] * row["steps"])
        cells = [name, str(row["batch"]), str(row["seed"]), share, took, pairs]
        lines.append([*cells, f"{row['peak_gib']:.1f}"])
    return (
        f"{markdown(lines)}\n\nSmolLM2-135M-Instruct, prompts of about {header['tokens']:,} "
        f"tokens, {header['gpu']}, TRL's trainer, LoRA r = 16 on all linears, rate 3e-4, 96 "
        "held-out pairs judged with all tokens kept; commit "
        f"`{header['commit']}`, {header['date']}, `benchmarks/quality/preference.py`."
    )


def hybrid_table(header: dict, rows: list[dict]) -> str:
    """Perplexity of held-out books after training in several ways, by kind of layers."""
    kinds = list(dict.fromkeys(row["model"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows if row["way"] != "base"))
    found = {(row["model"], row["way"]): row["perplexity"] for row in rows}
    lines = [["", *kinds]]
    for way in ways:
        cells = []
        for kind in kinds:
            dense, value = found[kind, "dense"], found[kind, way]
            more = "" if way == "dense" else f" (+{100 * (value / dense - 1):.1f} %)"
            cells.append(f"{value:.1f}{more}")
        lines.append([way, *cells])
    base, after = rows[0], rows[1]
    return (
        f"{markdown(lines)}\n\nPerplexity of held-out books, all tokens kept; {header['gpu']}, "
        f"models of {base['parameters'] / 1e6:.0f} M parameters, {base['steps']} steps from "
        f"nothing and {after['steps']} in each way, {base['rows']} × {base['tokens']:,} tokens a "
        f"step, one seed; commit `{header['commit']}`, {header['date']}, "
        "`benchmarks/bench_hybrid.py`."
    )
