"""The README's tables of optimizer steps, from ``results/*/bench_step.json``.

Without an option the tables are printed; ``--write`` puts them into README.md between the markers,
``--check`` fails if README.md differs from them.
"""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
START, END = "<!-- bench_step -->", "<!-- /bench_step -->"
PACKAGES = ("torch", "triton", "transformers", "peft")
OPTIONS = (
    "policy",
    "block_size",
    "agree_across_layers",
    "mlp_retention",
    "dense_first_layers",
    "dense_last_layers",
    "supervise",
)


def label(provider: str) -> str:
    """A provider as the head of a column."""
    base, _, checkpointing = provider.partition("+")
    name = "HF + PEFT" if base == "hf" else base.replace("lemo-", "LeMo ")
    return f"{name} + {checkpointing}" if checkpointing else name


def length(tokens: int) -> str:
    """``8192`` as ``8K``."""
    return str(tokens) if tokens % 1024 else f"{tokens // 1024}K"


def cell(row: dict | None) -> str:
    """``ms, GiB`` of a row, or why there are none."""
    status = "not run" if row is None else row["status"]
    if status == "ok":
        return f"{row['ms_median']:.0f} ms, {row['peak_gib']:.1f} GiB"
    if status == "oom":
        return "out of memory"
    if status.startswith("not run: OOM at "):
        return f"out of memory from {length(int(status.rsplit(' ', 1)[1]))} on"
    return status.partition(":")[0]


def tables(header: dict, rows: list[dict]) -> str:
    """Markdown: a table a model, then the conditions."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    parts = []
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = {(r["tokens"], r["provider"]): cell(r) for r in rows if r["model"] == model}
        lines = [["tokens", *map(label, providers)], ["---"] * (len(providers) + 1)]
        for tokens in sorted({tokens for tokens, _ in cells}):
            values = [cells.get((tokens, provider), cell(None)) for provider in providers]
            lines.append([length(tokens), *values])
        parts.append(f"**{model}** shapes, {header['gpu']}: ms a step, peak GiB allocated")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, conditions(header, rows)])


def conditions(header: dict, rows: list[dict]) -> str:
    """GPU, versions, commit, LeMo's options, and the commands."""
    versions = ", ".join(f"{name} {header[name]}" for name in PACKAGES)
    rounds = sorted({row["rounds"] for row in rows if row["status"] == "ok"})
    spread = " to ".join(str(n) for n in dict.fromkeys(rounds[:1] + rounds[-1:]))
    configs = {json.dumps({k: r["config"][k] for k in OPTIONS}) for r in rows if r["config"]}
    lemo = "; ".join(
        ", ".join(f"`{name}={value!r}`" for name, value in json.loads(config).items())
        for config in sorted(configs)
    )
    commands = "\n".join(header["commands"])
    return (
        f"{header['gpu']}, {versions}, commit `{header['commit']}`, {header['date']}. Medians of "
        f"{spread} rounds; LoRA r = {header['lora']['r']} in {header['lora_dtype']} on "
        f"{', '.join(header['lora']['target_modules'])}. LeMo: {lemo}.\n\n"
        f"```bash\n{commands}\n```"
    )


def all_tables() -> str:
    """The tables of every GPU there are results of."""
    files = sorted(HERE.glob("results/*/bench_step.json"))
    if not files:
        raise SystemExit("There are no results: run benchmarks/bench_step.py on a GPU first.")
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return "\n\n".join(tables(content["header"], content["rows"]) for content in contents)


def insert(text: str, block: str) -> str:
    """``text`` with ``block`` between the markers."""
    if text.count(START) != 1 or text.count(END) != 1:
        raise SystemExit(f"README.md must hold {START} and {END} once each.")
    before, _, rest = text.partition(START)
    return f"{before}{START}\n\n{block}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="put the tables into README.md")
    how.add_argument("--check", action="store_true", help="fail if README.md has others")
    args = parser.parse_args()
    block = all_tables()
    if not (args.write or args.check):
        print(block)
        return
    text = README.read_text(encoding="utf-8")
    new = insert(text, block)
    if args.write:
        README.write_text(new, encoding="utf-8")
    elif text != new:
        raise SystemExit("README.md is not up to date: python benchmarks/table.py --write")


if __name__ == "__main__":
    main()
