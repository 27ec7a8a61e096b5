"""The tables of the README and of docs/, from the JSON of the benchmarks and of the demo.

Without an option the tables are printed; ``--write`` puts them into the pages between the markers
of their name, ``--check`` fails if a page differs from them.
"""

import argparse
import json
from pathlib import Path

from kernel_table import ablation_table, kernel_tables
from plan_table import plan_table
from preference_table import hybrid_table, preference_quality_table, preference_table
from step_table import (
    completion_table,
    longest_tables,
    scaling_table,
    step_tables,
    trainer_table,
)

from benchmarks.quality.tables import all_tables, headline_table

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "docs" / "BENCHMARKS.md"
QUALITY = HERE.parent / "docs" / "QUALITY.md"
README = HERE.parent / "README.md"
DEMO = HERE.parent / "docs" / "demo.md"
REPORT = HERE.parent / "docs" / "demo" / "report.json"
QUALITY_RUN = "quality"
SEVERAL = ("bench_longest", "bench_completion")  # files a GPU
PACKAGES = ("torch", "triton", "transformers", "peft")


def predictor_table(header: dict, rows: list[dict]) -> str:
    """Markdown: what one layer's scores cost."""
    lines = [["tokens", "labels", "policy", "GPU, ms", "with the host, ms", "memory"], ["---"] * 6]
    for row in rows:
        numbers = [f"{row[name]:.2f}" for name in ("ms_kernels", "ms_median")]
        memory = f"+ {row['extra_mib']:,} MiB"
        lines.append([f"{row['tokens']:,}", row["labels"], row["policy"], *numbers, memory])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{table}\n\n{header['gpu']}, torch {header['torch']}, transformers "
        f"{header['transformers']}, commit `{header['commit']}`, {header['date']}, one layer of "
        "Llama-3 8B's sizes, `benchmarks/bench_predictor.py`."
    )


def demo_table(report: dict) -> str:
    """Markdown: the demo's results, the best way of training first."""
    columns = {
        "perplexity": ("held-out perplexity", ".2f"),
        "train_seconds": ("training s", ".0f"),
        "steps": ("steps", ",.0f"),
        "rows": ("rows seen", ",.0f"),
        "kept_tokens": ("kept of a row", ",.0f"),
        "saved_mib": ("saved for backward, MiB", ".0f"),
    }
    tables = []
    for task, results in report["results"].items():
        lines = [[task, *(title for title, _ in columns.values())], ["---"] * (len(columns) + 1)]
        for name, result in sorted(results.items(), key=lambda item: item[1]["perplexity"]):
            cells = [
                f"{result[x]:{form}}" if x in result else "" for x, (_, form) in columns.items()
            ]
            lines.append([name, *cells])
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    whole = "\n\n".join(tables)
    return (
        f"{whole}\n\n{report['settings']['seconds']:g} s of training each, rows of "
        f"{report['settings']['tokens']:,} tokens, 2 CPU cores; {versions}."
    )


def blocks() -> dict[str, str]:
    """Every generated block of docs/BENCHMARKS.md by the name of its markers."""
    makers = {
        "bench_step": step_tables,
        "bench_completion": completion_table,
        "bench_trainer": trainer_table,
        "bench_longest": longest_tables,
        "bench_kernels": kernel_tables,
        "bench_ablation": ablation_table,
        "bench_predictor": predictor_table,
        "bench_scaling": scaling_table,
        "bench_preference": preference_table,
        "bench_hybrid": hybrid_table,
        "preference_quality": preference_quality_table,
    }
    found = {}
    for name, make in makers.items():
        files = results(f"{name}*" if name in SEVERAL else name)
        found[name] = "\n\n".join(make(*content) for content in files)
    return {**found, "plan": plan_table()}


def results(name: str) -> list[tuple[dict, list[dict]]]:
    """Header and rows of each GPU's files of that name, which may be a pattern."""
    files = sorted(HERE.glob(f"results/*/{name}.json"))
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [(content["header"], content["rows"]) for content in contents]


def readme_blocks() -> dict[str, str]:
    """Every generated block of the README by the name of its markers."""
    found = {
        "completion": "\n\n".join(
            completion_table(*found, short=True) for found in results("bench_completion")
        ),
    }
    if quality := results(QUALITY_RUN):
        found["quality"] = "\n\n".join(headline_table(*content) for content in quality)
    return found


def demo_blocks() -> dict[str, str]:
    """The generated block of docs/demo.md."""
    return {"demo": demo_table(json.loads(REPORT.read_text(encoding="utf-8")))}


def quality_blocks() -> dict[str, str]:
    """Every generated block of docs/QUALITY.md by the name of its markers."""
    return {"quality": "\n\n".join(all_tables(*found) for found in results(QUALITY_RUN))}


def insert(text: str, name: str, block: str) -> str:
    """``text`` with ``block`` between the markers ``name``."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if not block and start not in text:  # not measured yet
        return text
    if text.count(start) != 1 or text.count(end) != 1:
        raise SystemExit(f"the page must hold {start} and {end} once each.")
    before, _, rest = text.partition(start)
    body = f"\n\n{block}\n\n" if block else "\n"
    return f"{before}{start}{body}{end}{rest.partition(end)[2]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--write", action="store_true", help="put the tables into the pages")
    how.add_argument("--check", action="store_true", help="fail if a page has others")
    args = parser.parse_args()
    pages = (
        (README, readme_blocks()),
        (DEMO, demo_blocks()),
        (BENCHMARKS, blocks()),
        (QUALITY, quality_blocks()),
    )
    for page, found in pages:
        text = new = page.read_text(encoding="utf-8")
        for name, block in found.items():
            new = insert(new, name, block)
            if not (args.write or args.check):
                print(block, end="\n\n")
        if args.write:
            page.write_text(new, encoding="utf-8")
        elif args.check and text != new:
            raise SystemExit(f"{page.name} is not up to date: python benchmarks/table.py --write")


if __name__ == "__main__":
    main()
