"""From PyTorch's record of allocations to a series: what memory holds, by origin, over one step."""

from dataclasses import dataclass

ORIGINS = (
    "weights and optimizer",
    "stream and its gradient",
    "stored for the backward",
    "attention",
    "MLP",
    "loss",
    "rows at work",
    "other",
)
BASE, STREAM, STORED, ATTENTION, MLP, LOSS, ROWS, OTHER = ORIGINS

# Part of a file's name, function or None for all of them, origin. The innermost frame that has a
# rule decides.
RULES = (
    ("kernels/segment_cross_entropy.py", None, LOSS),
    ("lemo_hf/core/loss.py", None, LOSS),
    ("kernels/gated_activation.py", None, MLP),
    ("lemo_hf/core/fused.py", "run", MLP),
    ("lemo_hf/memory/recompute.py", "backward", MLP),
    ("integrations/sdpa_attention.py", None, ATTENTION),
    ("kernels/rotary.py", None, ATTENTION),
    ("lemo_hf/core/attention_call.py", "call_attention", ATTENTION),
    ("lemo_hf/core/layer.py", "attend", ATTENTION),
    ("lemo_hf/memory/offload.py", None, STORED),
    ("kernels/rows.py", "open_stream", STREAM),
    ("nn/modules/sparse.py", None, STREAM),
    ("kernels/gather_norm.py", None, ROWS),
    ("kernels/scatter_add.py", None, ROWS),
    ("lemo_hf/memory/recompute.py", "forward", MLP),
    ("torch/optim/", None, BASE),
)
# Autograd's own thread has no Python frames. What runs there without any is the backward of
# attention and of its projections: the rest is Python code of this repository.
WITHOUT_FRAMES = ATTENTION


@dataclass
class Piece:
    """One allocation.

    Attributes:
        size: Bytes.
        origin: One of `ORIGINS`.
        where: The innermost frame outside PyTorch.
        start: Index of the event that makes it.
        end: Index of the event that frees it, or the number of events.
    """

    size: int
    origin: str
    where: str
    start: int
    end: int


def origin_of(frames: list[dict]) -> str:
    """Where an allocation belongs, by its Python frames, innermost first."""
    if not frames:
        return WITHOUT_FRAMES
    for frame in frames:
        for file, function, origin in RULES:
            if file in frame["filename"] and function in (None, frame["name"]):
                return origin
    return OTHER


def where_of(frames: list[dict]) -> str:
    """``file:function`` of the innermost frame outside PyTorch."""
    for frame in frames:
        if "/torch/" not in frame["filename"]:
            return f"{'/'.join(frame['filename'].split('/')[-2:])}:{frame['name']}"
    return "autograd"


def pieces_of(trace: list[dict], stream_bytes: int) -> tuple[list[Piece], list[int]]:
    """Allocations of a trace, and the time in us of each event that counts.

    What the forward makes and the loss finds in place is stored for the backward, whoever made it;
    what the loss makes in the stream's own size is the stream's gradient.
    """
    events = [e for e in trace if e["action"] in ("alloc", "free_requested")]
    alive: dict[int, Piece] = {}
    pieces, first_loss = [], None
    for index, event in enumerate(events):
        if event["action"] == "free_requested":
            if event["addr"] in alive:
                alive.pop(event["addr"]).end = index
            continue
        frames = event.get("frames") or []
        piece = Piece(event["size"], origin_of(frames), where_of(frames), index, len(events))
        if piece.origin == LOSS:
            first_loss = index if first_loss is None else first_loss
            if abs(piece.size - stream_bytes) <= 2**21:
                piece.origin = STREAM
        pieces.append(piece)
        alive[event["addr"]] = piece
    for piece in pieces:
        crosses = first_loss is not None and piece.start < first_loss < piece.end
        if crosses and piece.origin in (ATTENTION, MLP, ROWS, OTHER):
            piece.origin = STORED
    return pieces, [event.get("time_us", index) for index, event in enumerate(events)]


def series_of(
    pieces: list[Piece], times: list[int], base_bytes: int, points: int = 600
) -> list[list[float]]:
    """Bytes by origin over the step, at the highest moment of each of ``points`` spans.

    Returns:
        Lists of: ms since the first event, then GiB of each of `ORIGINS`.
    """
    changes: dict[int, list[tuple[str, int]]] = {}
    for piece in pieces:
        changes.setdefault(piece.start, []).append((piece.origin, piece.size))
        changes.setdefault(piece.end, []).append((piece.origin, -piece.size))
    now = dict.fromkeys(ORIGINS, 0) | {BASE: base_bytes}
    best: dict[int, list[float]] = {}
    span = max(1, -(-len(times) // points))
    for index, time in enumerate(times):
        for origin, size in changes.get(index, ()):
            now[origin] += size
        entry = [(time - times[0]) / 1e3, *(now[origin] / 2**30 for origin in ORIGINS)]
        if index // span not in best or sum(entry[1:]) > sum(best[index // span][1:]):
            best[index // span] = entry
    return [[round(x, 4) for x in best[key]] for key in sorted(best)]


def at_the_peak(pieces: list[Piece], count: int = 20) -> tuple[int, list[dict]]:
    """The most bytes alive, and the largest allocations at that moment by origin and place."""
    changes = sorted(
        [(piece.start, piece.size) for piece in pieces] + [(p.end, -p.size) for p in pieces]
    )
    now = most = moment = 0
    for index, size in changes:  # at one index there is one event
        now += size
        if now > most:
            most, moment = now, index
    alive: dict[tuple[str, str], list[int]] = {}
    for piece in pieces:
        if piece.start <= moment < piece.end:
            alive.setdefault((piece.origin, piece.where), []).append(piece.size)
    rows = [
        {"origin": origin, "where": where, "count": len(sizes), "gib": sum(sizes) / 2**30}
        for (origin, where), sizes in alive.items()
    ]
    rows.sort(key=lambda row: row["gib"], reverse=True)
    return most, [row | {"gib": round(row["gib"], 4)} for row in rows[:count]]
