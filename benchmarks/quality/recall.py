"""Which share of the blocks that answers need each ranking keeps, by kind of question.

Predictors are trained on the frozen base model's attention over training rows of all tasks; recall
is measured on rows of held-out books and held-out words whose needed blocks are known by
construction, a kind of question a row. Rankings by layer read the model: ``oracle`` the real
queries and keys of the layer, ``oracle from`` the mean over it and those above it (predictors
learn that of the upper half), ``pooled`` the means of blocks, ``predictor`` what was trained,
``untrained`` what it began as, by which tokens look for their like.

    python -m benchmarks.quality.recall out/recall.json --model BASE --data TEXTS
    python -m benchmarks.quality.recall rows.jsonl --export --model BASE --data TEXTS

The second writes the training rows for `lemo train-predictor --dataset rows.jsonl`.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.quality.completion_rows import _completion
from benchmarks.quality.facts import HIDDEN_KINDS, LEXICAL_KINDS, MAKERS, Draw
from benchmarks.quality.model import load_model
from benchmarks.quality.row import Row, RowSet
from benchmarks.quality.rows import row_of
from benchmarks.quality.source import Source
from benchmarks.quality.texts import Texts
from lemo_hf.batch.selection import keep_blocks, num_kept_blocks
from lemo_hf.config import LeMoConfig
from lemo_hf.core.observe import observe
from lemo_hf.core.policies import POLICIES, ScoreInputs, sublayer_input
from lemo_hf.predictors.overlap import overlap_scores
from lemo_hf.predictors.predictor_set import LeMoPredictor
from lemo_hf.predictors.rarity import rarity
from lemo_hf.predictors.training_free import mix_ranks, random_scores
from lemo_hf.tune.looked_at import collate
from lemo_hf.tune.train_predictor import PredictorTraining, train_predictor

TASKS = ("lexical", "hidden", "text")  # of training rows, in turns
KINDS = (*LEXICAL_KINDS, *HIDDEN_KINDS)
QUESTIONS = 6  # of one kind, a test row
RETENTIONS = (0.1, 0.15, 0.3)
MIXED = 0.5  # the predictor's share in a mixture


def training_row(source: Source, tokens: int, index: int) -> dict[str, np.ndarray]:
    """Row ``index`` to train predictors on."""
    task = TASKS[index % len(TASKS)]
    row = row_of(source, RowSet(task, tokens), index // len(TASKS))
    return {"input_ids": row.ids.astype(np.int64), "labels": row.labels}


def test_row(source: Source, tokens: int, kind: str, index: int) -> Row:
    """Row ``index`` whose questions are all of one kind; a quarter of the facts are not asked."""
    rng = np.random.default_rng((KINDS.index(kind), tokens, index))
    rows = RowSet("hidden", tokens, split="test")
    draw = Draw(rng, rows.split)
    if kind == "quotation":
        told = [draw.value() for _ in range(QUESTIONS)]
        return _completion(source, rows, rng, told, [], quotations=QUESTIONS)
    told = [MAKERS[kind](draw) for _ in range(QUESTIONS + 2)]
    return _completion(source, rows, rng, told, told[:QUESTIONS])


@torch.no_grad()
def rankings(
    model, row: Row, predictor: LeMoPredictor, layers: Sequence[int]
) -> Iterator[tuple[str, int | None, Tensor, ScoreInputs]]:
    """Scores ``[1, N]`` of one row by every ranking: its name, its layer or None, and the pass."""
    config = LeMoConfig(policy="oracle", block_size=predictor.info.block_size)
    batch = collate([{"input_ids": row.ids.astype(np.int64), "labels": row.labels}], model.device)
    found: list[tuple[str, int | None, Tensor, ScoreInputs]] = []
    oracles: dict[int, Tensor] = {}

    def see(inputs: ScoreInputs) -> None:
        layer, sparse_pass = inputs.layer_index, inputs.sparse_pass
        if layer == 0:
            ids, asking = sparse_pass.input_ids, sparse_pass.asking_tokens
            for hops in (1, 2, 4):
                scores = overlap_scores(ids, asking, config.block_size, hops=hops)
                found.append((f"overlap, {hops} hops", None, scores, inputs))
            found.append(("recent", None, POLICIES["recent"](inputs), inputs))
            chance = random_scores(sparse_pass.keys, sparse_pass.num_blocks, 0)
            found.append(("random", None, chance, inputs))
        oracles[layer] = POLICIES["oracle"](inputs)
        if layer in layers:
            found.append(("oracle", layer, oracles[layer], inputs))
            found.append(("pooled", layer, POLICIES["pooled"](inputs), inputs))
        network = predictor.layers[layer]
        if network is None:
            return
        read = sublayer_input(inputs, inputs.x)
        for name, net in (("predictor", network), ("untrained", network.untrained(read))):
            scores = net(read, *asked(sparse_pass), rare=rarity(sparse_pass.input_ids))
            found.append((name, layer, scores, inputs))
            for hops, overlap in ((2, found[1][2]), (4, found[2][2])):
                mixture = mix_ranks(overlap, scores, MIXED, sparse_pass.real)
                found.append((f"overlap, {hops} hops + {name}", layer, mixture, inputs))

    observe(model, config, batch["input_ids"], see, targets=batch["targets"])
    first = found[0][3]
    for layer in layers:
        above = torch.stack([scores for i, scores in oracles.items() if i >= layer]).mean(0)
        found.append(("oracle from", layer, above, first))
    yield from found


def asked(sparse_pass) -> tuple[Tensor, Tensor]:
    """The blocks that ask, as the policies take them."""
    index = sparse_pass.asking_blocks[0].nonzero()[:, 0][None]
    return index, torch.ones_like(index, dtype=torch.bool)


def measure(
    model, source: Source, predictor: LeMoPredictor, args: argparse.Namespace
) -> list[dict]:
    """A row for each kind, ranking, layer and retention with the mean ``recall``."""
    found: dict[tuple, list[float]] = {}
    for kind in KINDS:
        for index in range(args.rows):
            row = test_row(source, args.tokens, kind, index)
            gold = torch.from_numpy(row.gold_blocks(predictor.info.block_size))[None]
            for name, layer, scores, inputs in rankings(model, row, predictor, args.oracles):
                sparse_pass = inputs.sparse_pass
                for retention in RETENTIONS:
                    budget = max(
                        num_kept_blocks(retention, sparse_pass.num_blocks),
                        int(sparse_pass.required.sum()),
                    )
                    kept = keep_blocks(scores, sparse_pass.real, sparse_pass.required, budget).cpu()
                    share = (kept & gold).sum().item() / gold.sum().item()
                    found.setdefault((kind, name, layer, retention), []).append(share)
    names = ("kind", "ranking", "layer", "retention")
    return [
        {**dict(zip(names, key, strict=True)), "recall": round(float(np.mean(values)), 4)}
        for key, values in found.items()
    ]


def table(rows: list[dict], retention: float) -> str:
    """Markdown: a ranking a line, a kind a column."""
    lines = [
        f"| recall at retention {retention:g} | layer | {' | '.join(KINDS)} | mean |",
        "| --- | --- |" + " --- |" * (len(KINDS) + 1),
    ]
    found = {
        (r["ranking"], r["layer"], r["kind"]): r["recall"]
        for r in rows
        if r["retention"] == retention
    }
    for ranking, layer in sorted({key[:2] for key in found}, key=lambda k: (k[0], k[1] or 0)):
        values = [found[ranking, layer, kind] for kind in KINDS]
        cells = " | ".join(f"{value:.2f}" for value in [*values, float(np.mean(values))])
        lines.append(f"| {ranking} | {'' if layer is None else layer} | {cells} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("output", type=Path, help="JSON of the recalls; with --export rows to train on")
    add("--model", type=Path, required=True, help="directory made by make_base.py")
    add("--data", type=Path, required=True, help="folder made by prepare.py")
    add("--export", action="store_true", help="write the training rows as JSON lines, no more")
    add("--tokens", type=int, default=32768)
    add("--block-size", type=int, default=64)
    add("--train-rows", type=int, default=180, help="to train predictors on")
    add("--layers", type=int, nargs="+", default=[0, 4, 8, 12, 16], help="with a predictor")
    add("--oracles", type=int, nargs="+", default=[0, 4, 8, 12, 16, 20, 24, 28])
    add("--rank", type=int, default=PredictorTraining.rank)
    add("--asking", type=int, default=PredictorTraining.asking)
    add("--epochs", type=int, default=1)
    add("--learning-rate", type=float, default=PredictorTraining.learning_rate)
    add("--rows", type=int, default=3, help="of each kind, to measure")
    add("--seed", type=int, default=0)
    add("--save", type=Path, help="directory for the predictors")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = Source(Texts.load(args.data), AutoTokenizer.from_pretrained(args.model))
    train = [training_row(source, args.tokens, index) for index in range(args.train_rows)]
    if args.export:
        with args.output.open("w") as file:
            for row in train:
                print(json.dumps({k: v.tolist() for k, v in row.items()}), file=file)
        return
    model = load_model(args.model, args.tokens, device).unload()  # without the adapter
    how = PredictorTraining(
        layers=tuple(args.layers),
        block_size=args.block_size,
        rank=args.rank,
        asking=args.asking,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    start = time.perf_counter()
    predictor = train_predictor(model, train, how)
    seconds = {"train": round(time.perf_counter() - start, 1)}
    if args.save:
        predictor.save_pretrained(args.save)
    start = time.perf_counter()
    rows = measure(model, source, predictor, args)
    seconds["measure"] = round(time.perf_counter() - start, 1)
    settings = {name: str(value) for name, value in vars(args).items()}
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    result = {"device": name, "settings": settings, "seconds": seconds, "rows": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for retention in RETENTIONS:
        print(table(rows, retention), flush=True)
    print(seconds)


if __name__ == "__main__":
    main()
