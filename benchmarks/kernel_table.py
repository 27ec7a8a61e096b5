"""The tables of kernels."""

# What a cell shows of a row, and what that is.
KERNELS = {
    "rows": (
        ("ms_median", "gb_per_s", "share_of_copy"),
        "rows of the stream: ms, GB/s of the least traffic, share of a copy's",
    ),
    "movement": (
        ("ms_median", "extra_mib"),
        "out of the stream, norm, back into it: ms, memory beside the inputs (naive: the update is "
        "scattered into zeros, which are added)",
    ),
    "segment_cross_entropy": (
        ("ms_median", "peak_mib", "extra_mib", "grad_error", "weight_error"),
        "`segment_cross_entropy`: ms, peak memory, of it beside the inputs, error of the gradient "
        "of hidden (and of the weight) against fp64",
    ),
    "gated_activation": (
        ("ms_median", "share_of_copy", "saved_mib"),
        "`gated_activation`: ms, share of a copy's GB/s, saved for backward",
    ),
    "rotary": (("ms_median", "share_of_copy"), "`rotary`: ms, share of a copy's GB/s"),
}
FORMS = {  # how a field is written
    "ms_median": lambda ms: f"{ms:.{0 if ms >= 100 else 1 if ms >= 10 else 2}f} ms",
    "gb_per_s": lambda rate: f"{rate:,.0f} GB/s",
    "share_of_copy": lambda share: f"{share:.0%}",
    "peak_mib": lambda mib: memory(mib),
    "extra_mib": lambda mib: f"+ {memory(mib)}",
    "saved_mib": lambda mib: f"{memory(mib)} saved",
    "grad_error": lambda error: f"{100 * error:.2g}%",
    "weight_error": lambda error: f"{100 * error:.2g}%",
}


def memory(mib: float) -> str:
    """MiB, or GiB from 1024 on."""
    if 0 < mib < 1:
        return "< 1 MiB"
    return f"{mib:,.0f} MiB" if mib < 1024 else f"{mib / 1024:,.1f} GiB"


def kernel_tables(header: dict, rows: list[dict]) -> str:
    """Markdown: a table a kernel, a case a row, a provider a column; then the conditions."""
    parts = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == kernel and row["case"] != "inputs"]
        if not own:
            continue
        fields, title = KERNELS[kernel]
        cases: dict[str, dict[str, dict]] = {}
        for row in own:
            cases.setdefault(row["case"], {})[row["provider"]] = row
        providers = list(max(cases.values(), key=len))
        lines = [[own[0]["shape"], *providers], ["---"] * (len(providers) + 1)]
        for case, found in cases.items():
            size = found.get("lemo", {}).get("materialised_mib")
            name = f"{case} ({memory(size)} of scores)" if size else case
            lines.append([name, *(kernel_cell(found.get(p), fields) for p in providers)])
        parts.append(f"**{title[0].upper()}{title[1:]}**")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, kernel_conditions(header)])


def kernel_cell(row: dict | None, fields: tuple[str, ...]) -> str:
    """``fields`` of a row, or why there are none."""
    if row is None:
        return ""
    if row["status"] != "ok":
        return row["status"].partition(":")[0]
    return ", ".join(FORMS[name](row[name]) for name in fields if name in row)


def kernel_conditions(header: dict) -> str:
    """GPU, versions, commit, ceilings, and the commands."""
    packages = ("torch", "triton", "transformers", "liger_kernel", "cut_cross_entropy")
    versions = ", ".join(f"{name} {header[name]}" for name in packages)
    copy, product = header["ceilings"]["copy_gb_per_s"], header["ceilings"]["matmul_tflops"]
    commands = "\n".join(header["commands"])
    return (
        f"{header['gpu']}, {versions}, commit `{header['commit']}`, {header['date']}; bf16, "
        f"medians of {header['rounds']} rounds in which providers take turns. In the same run a "
        f"copy moved {copy:,.0f} GB/s, an 8192³ matrix product ran at {product:.0f} TFLOP/s. "
        "Peaked: most of the softmax falls on the target, which CCE's filter of small entries is "
        f"made for.\n\n```bash\n{commands}\n```"
    )


def ablation_table(header: dict, rows: list[dict]) -> str:
    """Markdown: a variant a row, a step a column."""
    steps = list(dict.fromkeys((row["provider"], row["tokens"]) for row in rows))
    heads = [f"{provider}, {tokens // 1024}K" for provider, tokens in steps]
    lines = [[f"{header['model']}, whole step", *heads], ["---"] * (len(steps) + 1)]
    cells = {(r["variant"], r["provider"], r["tokens"]): r for r in rows}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        found = [cells.get((variant, *step)) for step in steps]
        lines.append([variant, *("" if row is None else ablation_cell(row) for row in found)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ablation_cell(row: dict) -> str:
    """``ms, GiB`` of a row, or why there are none."""
    if row["status"] != "ok":
        return row["status"].partition(":")[0]
    return f"{row['ms_median']:.0f} ms, {row['peak_gib']:.1f} GiB"
