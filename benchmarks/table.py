"""The tables of README.md and docs/QUALITY.md, from the JSON of the benchmarks and of the demo.

Without an option the tables are printed; ``--write`` puts them into the pages between the markers
of their name, ``--check`` fails if a page differs from them.
"""

import argparse
import json
from pathlib import Path

from kernel_table import ablation_table, kernel_tables
from plan_table import plan_table
from step_table import longest_tables, scaling_table, step_tables

from benchmarks.quality.tables import all_tables, summary_table

HERE = Path(__file__).parent
QUALITY = HERE.parent / "docs" / "QUALITY.md"
README = HERE.parent / "README.md"
DEMO = HERE.parent / "docs" / "demo" / "report.json"
PACKAGES = ("torch", "triton", "transformers", "peft")


def quality_table(header: dict, rows: list[dict]) -> str:
    """Markdown: the headline settings beside dense and other ways to save."""
    table = summary_table(rows, ("headline", "equal_time", "controls"))
    return (
        f"{table}\n\n{header['gpu']}, torch {header['torch']}, transformers "
        f"{header['transformers']}, commit `{header['commit']}`, {header['date']}; means over "
        "seeds, in brackets the range of the change; step time and memory alone on a GPU."
    )


def predictor_table(header: dict, rows: list[dict]) -> str:
    """Markdown: recall of each reported predictor and of other rankings, mean (least layer)."""
    policies = ("predictor", "position", "previous", "pooled", "random")
    lines = [["scores", "documents", "retention", *policies], ["---"] * (3 + len(policies))]
    cells = {}
    for row in rows:
        if row["part"] == "recall" and row["model"] == "base":
            key = (row["training"], row["head"], row["documents"], row["retention"])
            cells.setdefault(key, {})[row["policy"]] = f"{row['mean']:.3f} ({row['least']:.2f})"
    for (training, head, documents, retention), found in cells.items():
        if set(policies) <= set(found):
            named = training if head == "attention" else "MLP activation"
            lines.append([named, documents, f"{retention:g}", *(found[name] for name in policies)])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{table}\n\n{header['gpu']}, torch {header['torch']}, transformers "
        f"{header['transformers']}, commit `{header['commit']}`, {header['date']}, "
        f"{header['tokens']:,} tokens, `benchmarks/bench_predictor.py`."
    )


def demo_table(report: dict) -> str:
    """Markdown: the demo's results."""
    columns = {
        "perplexity": ("held-out perplexity", ".2f"),
        "train_seconds": ("training s", ".0f"),
        "tokens_per_second": ("tokens/s", ",.0f"),
        "kept_tokens": ("kept tokens a layer", ",.0f"),
        "saved_mib": ("saved for backward, MiB", ".0f"),
    }
    lines = [["", *(title for title, _ in columns.values())], ["---"] * (len(columns) + 1)]
    for name, result in report["results"].items():
        form = {key: ".3f" if name == "ratio" else form for key, (_, form) in columns.items()}
        cells = [f"{result[key]:{form[key]}}" if key in result else "" for key in columns]
        lines.append(["LeMo / dense" if name == "ratio" else name, *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{table}\n\n{report['settings']['steps']} steps on 2 CPU cores; {versions}."


def blocks() -> dict[str, str]:
    """Every generated block of the README by the name of its markers."""
    steps, longest, kernels, ablations, quality, predictors, scaling = ([] for _ in range(7))
    for file in sorted(HERE.glob("results/*/*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if file.name == "bench_step.json":
            steps.append(step_tables(content["header"], content["rows"]))
        elif file.name.startswith("bench_longest"):
            longest.append(longest_tables(content["header"], content["rows"]))
        elif file.name == "bench_kernels.json":
            kernels.append(kernel_tables(content["header"], content["rows"]))
        elif file.name == "bench_ablation.json":
            ablations.append(ablation_table(content["header"], content["rows"]))
        elif file.name == "bench_quality.json":
            quality.append(quality_table(content["header"], content["rows"]))
        elif file.name == "bench_scaling.json":
            scaling.append(scaling_table(content["header"], content["rows"]))
        elif file.name == "bench_predictor.json":
            predictors.append(predictor_table(content["header"], content["rows"]))
    return {
        "bench_step": "\n\n".join(steps),
        "bench_longest": "\n\n".join(longest),
        "bench_kernels": "\n\n".join(kernels),
        "bench_ablation": "\n\n".join(ablations),
        "bench_quality": "\n\n".join(quality),
        "bench_predictor": "\n\n".join(predictors),
        "bench_scaling": "\n\n".join(scaling),
        "plan": plan_table(),
        "demo": demo_table(json.loads(DEMO.read_text(encoding="utf-8"))),
    }


def quality_blocks() -> dict[str, str]:
    """Every generated block of docs/QUALITY.md by the name of its markers."""
    found = {}
    for file in sorted(HERE.glob("results/*/bench_quality*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        found[file.stem] = all_tables(content["header"], content["rows"])
    return found


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
    for page, found in ((README, blocks()), (QUALITY, quality_blocks())):
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
