"""The page of a run: one HTML file that needs nothing but itself.

It shows what no tracker has. Curves of loss, speed and memory are in `report_to`'s.
"""

import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lemo_hf.report.data import CELL, POSITION, RECORD_NAME, RunFiles, read_run
from lemo_hf.report.figures import heat_map
from lemo_hf.report.place_figures import place_curve, places_by_layer, places_by_step
from lemo_hf.report.places import mean_curves
from lemo_hf.shown import shown
from lemo_hf.storage.files import whole_file

__all__ = ["RECORD_NAME", "render", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"


def write_report(directory: str | os.PathLike, path: str | os.PathLike | None = None) -> Path:
    """Write the page of a run.

    Args:
        directory: Output directory of a Trainer. `ReportCallback` leaves there what the page shows
            of layers and settings; without it the page says what it lacks.
        path: Path of the page; None is ``report.html`` in the directory.

    Raises:
        OSError: There is no such directory.
        ValueError: It holds no run, or a file of it is damaged.
    """
    target = Path(directory, "report.html") if path is None else Path(path)
    page = render(read_run(directory))
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as part:
        # Names of files need not be text.
        Path(part).write_text(page, encoding="utf-8", errors="replace")
    return target


def render(run: RunFiles) -> str:
    """The page's HTML; every text in it is escaped."""
    templates = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["number"] = _number
    return templates.get_template("report.html.j2").render(
        run=run,
        dense=_is_dense(run),
        tiles=_tiles(run),
        retention=_retention(run.record.get("rows", [])),
        places=_places(run.record.get("moments", []), run.record.get("place_layers")),
        evaluations=_evaluations(run),
        environment=run.record.get("environment") or {},
    )


def _tiles(run: RunFiles) -> dict[str, Any]:
    """The few numbers that one looks for first."""
    history, model = run.history, run.record.get("model") or {}
    tiles: dict[str, Any] = {"model": model.get("name")}
    if model:
        tiles["trained parameters"] = f"{model['trained']:,} of {model['parameters']:,}"
    tiles["steps"] = max((line["step"] for line in history if "step" in line), default=None)
    tiles["last loss"] = _last(history, "loss")
    tiles["evaluation loss"] = _last(history, "eval_loss")
    name = "lemo/attention_retention"
    shares = [line[name] for line in history if name in line]
    tiles["mean retention"] = sum(shares) / len(shares) if shares else None
    tiles["peak GPU memory, GiB"] = _last(history, "lemo/peak_memory_gib")
    return {name: value for name, value in tiles.items() if value is not None}


def _is_dense(run: RunFiles) -> bool:
    """Whether the run is known to have had no LeMo, by its record and by its log."""
    without = "lemo" in run.record and run.record["lemo"] is None
    return without and not any("lemo/attention_retention" in line for line in run.history)


def _retention(rows: list[dict]) -> dict[str, Any]:
    """Heat maps by sublayer."""
    known = [row for row in rows if "attention" in row]
    if not known:
        return {}
    steps = [row["step"] for row in known]
    return {
        title: heat_map(
            list(zip(*(row[name] for row in known), strict=True)), steps, "step", "layer"
        )
        for name, title in _sublayers(known).items()
    }


def _places(moments: list[dict], layers: list[int] | None) -> dict[str, Any]:
    """Figures by title of where in the row blocks were kept, likewise."""
    if not moments:
        return {}
    names = _sublayers(moments)
    steps = [(moment["first"], moment["last"]) for moment in moments]
    by_layer = {name: mean_curves(moments, name) for name in names}
    found = {f"{names[x]}, the whole run": place_curve(_mean(by_layer[x])) for x in names}
    for name, title in names.items():
        curves = [_mean(moment[name]) for moment in moments]
        found[f"{title}, step by step"] = places_by_step(curves, steps)
    for name, title in names.items() if layers is not None else ():
        found[f"{title}, layer by layer"] = places_by_layer(by_layer[name], layers or [])
    return found


def _sublayers(rows: list[dict]) -> dict[str, str]:
    """Sublayers and their titles: one where the MLPs kept what the attentions kept."""
    if all(row["attention"] == row["mlp"] for row in rows):
        return {"attention": "attention and MLP"}
    return {"attention": "attention", "mlp": "MLP"}


def _mean(curves: list[list[float]]) -> list[float]:
    return [sum(shares) / len(shares) for shares in zip(*curves, strict=True)]


def _evaluations(run: RunFiles) -> list[dict[str, Any]]:
    """Tables: what was evaluated, and its numbers."""
    found = []
    for path, values in run.evaluations.items():
        table: dict[str, Any] = {
            "title": path,
            "facts": {k: v for k, v in values.items() if k != "kind" and _is_plain(v)},
            "columns": [],
            "rows": [],
        }
        if values["kind"] == "perplexity":
            table["columns"] = list(POSITION)
            table["rows"] = [[b[c] for c in table["columns"]] for b in values["by_position"]]
        elif values["kind"] == "retrieval":
            table["columns"] = list(CELL)
            table["rows"] = [[cell[c] for c in table["columns"]] for cell in values["cells"]]
        elif values["kind"] == "longbench" and not table["facts"]:
            buckets = list(
                dict.fromkeys(b for v in values.values() if isinstance(v, dict) for b in v)
            )
            table["columns"] = ["task", *buckets]
            table["rows"] = [
                [task, *(scores.get(b) for b in buckets)]
                for task, scores in values.items()
                if isinstance(scores, dict)
            ]
        found.append(table)
    return found


def _last(lines: list[dict], key: str) -> Any:
    return next((line[key] for line in reversed(lines) if line.get(key) is not None), None)


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)


def _number(value: Any) -> Any:
    """Numbers with four digits; other values as they are."""
    if isinstance(value, float) and not (value.is_integer() and abs(value) < 1e15):
        return f"{value:,.4g}"
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{int(value):,}"
    if isinstance(value, list):
        return ", ".join(shown(x) if isinstance(x, list) else str(_number(x)) for x in value) or (
            "none"
        )
    if isinstance(value, dict):
        return shown(value)
    return "-" if value is None else value
