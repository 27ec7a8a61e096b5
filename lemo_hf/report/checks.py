"""Whether the files of a run have the shape that its page reads: damage is told with its place."""

from typing import Any

from lemo_hf.shown import shown

LARGEST = 2**63
# What the page reads of Trainer's log.
LOGGED = ("loss", "eval_loss", "lemo/attention_retention", "lemo/peak_memory_gib")


def check_history(lines: Any, where: str) -> None:
    """Trainer's ``log_history``; raises ValueError, as all of these do."""
    _check_rows(lines, f"log_history of {where}", may=("step", *LOGGED))
    for number, line in enumerate(lines, 1):
        if "step" not in line and line.keys() & set(LOGGED):
            _fail(f"row {number} of log_history of {where}", "must have a number 'step'", line)


def check_record(record: dict[str, Any], where: str) -> None:
    """What `ReportCallback` writes."""
    for name in ("model", "lemo", "environment"):
        value = record.get(name)
        if not isinstance(value, dict | None):
            _fail(f"{name!r} of {where}", "must be an object", value)
    for name, value in (record.get("environment") or {}).items():
        if not isinstance(value, dict):
            _fail(f"{name!r} of 'environment' of {where}", "must be an object", value)
    for name in ("trained", "parameters") if record.get("model") else ():
        value = record["model"].get(name)
        if type(value) is not int:
            _fail(f"{name!r} of 'model' of {where}", "must be an integer", value)
    if not isinstance(record.get("sparse"), str | None):
        _fail(f"'sparse' of {where}", "must be text", record["sparse"])
    rows = record.get("rows", [])
    _check_rows(rows, f"rows of {where}", ("step",))
    _check_shares(rows, f"rows of {where}")
    _check_moments(record, where)


def check_recall(table: Any, where: str) -> None:
    """A predictor's recall table."""
    where = f"the recall of {where}"
    _check_rows(table, where, ("layer", "retention", "recall"))
    for number, row in enumerate(table, 1):
        for name in ("policy", "documents"):
            if not isinstance(row.get(name), str):
                _fail(f"row {number} of {where}", f"must have a text {name!r}", row)


def has_rows(values: Any, *needs: str) -> bool:
    """Whether ``values`` is a list of objects with these numbers."""
    try:
        _check_rows(values, "", needs)
    except ValueError:
        return False
    return True


def _check_shares(rows: list[dict[str, Any]], where: str) -> None:
    """What each layer kept: as many numbers in every row that has them."""
    layers = None
    for number, row in enumerate(rows, 1):
        if not row.keys() & {"attention", "mlp"}:
            continue
        for name in ("attention", "mlp"):
            shares: Any = row.get(name)
            if not (isinstance(shares, list) and shares and all(map(_is_number, shares))):
                _fail(f"row {number} of {where}", f"must have numbers by layer as {name!r}", shares)
            layers = layers or len(shares)
            if len(shares) != layers:
                _fail(f"{name!r} of row {number} of {where}", f"must have {layers} layers", shares)


def _check_moments(record: dict[str, Any], where: str) -> None:
    """What was kept by place: steps that follow each other, and as many curves in each."""
    layers, moments = record.get("place_layers"), record.get("moments", [])
    whole = isinstance(layers, list) and layers and all(type(i) is int for i in layers)
    if layers is not None and not whole:
        _fail(f"'place_layers' of {where}", "must be a list of layers, or null", layers)
    where = f"moments of {where}"
    _check_rows(moments, where, ("first", "last", "rows"))
    step, shape = 0, None
    for number, moment in enumerate(moments, 1):
        counts = [moment[name] for name in ("first", "last", "rows")]
        first, last, rows = counts
        if not (all(type(n) is int for n in counts) and step < first <= last and rows > 0):
            _fail(f"row {number} of {where}", "must have steps after those before", counts)
        step = last
        for name in ("attention", "mlp"):
            curves: Any = moment.get(name)
            found = _shape(curves)
            if found is None or found[0] != len(layers or [0]) or found != (shape or found):
                _fail(f"{name!r} of row {number} of {where}", "must be curves of shares", curves)
            shape = found


def _shape(curves: Any) -> tuple[int, int] | None:
    """Number and length of ``curves``, if they are some."""
    if not isinstance(curves, list) or not all(isinstance(x, list) and x for x in curves):
        return None
    lengths = {len(curve) for curve in curves}
    shares = all(_is_number(x) and 0 <= x <= 1 for curve in curves for x in curve)
    return (len(curves), lengths.pop()) if shares and len(lengths) == 1 else None


def _check_rows(
    rows: Any, where: str, needs: tuple[str, ...] = (), may: tuple[str, ...] = ()
) -> None:
    if not isinstance(rows, list):
        _fail(where, "must be a list", rows)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            _fail(f"row {number} of {where}", "must be an object", row)
        for name in (*needs, *(name for name in may if name in row)):
            if not _is_number(row.get(name)):
                _fail(f"row {number} of {where}", f"must have a number {name!r}", row.get(name))


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < LARGEST
    return type(value) is float


def _fail(where: str, must: str, value: Any) -> None:
    raise ValueError(f"{where} {must}, got {shown(value)}: restore the file, or remove it.")
