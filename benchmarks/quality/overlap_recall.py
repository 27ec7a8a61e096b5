"""Which share of the needed blocks overlap keeps, by hops and by who asks: no model, no GPU.

Rows are those of `recall.py`: held-out books and words, six questions of one kind each, whose
needed blocks are known by construction.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoTokenizer

from benchmarks.quality.recall import KINDS, test_row
from benchmarks.quality.row import Row
from benchmarks.quality.source import Source
from benchmarks.quality.texts import Texts
from lemo_hf.batch.selection import keep_blocks, num_kept_blocks
from lemo_hf.config import LeMoConfig
from lemo_hf.core.loss import shifted
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX
from lemo_hf.predictors.overlap import overlap_scores

RETENTIONS = (0.1, 0.3)
# Who asks, and hops.
VARIANTS = (("both", 1), ("both", 2), ("both", 3), ("both", 4), ("question", 4), ("answer", 4))


def pass_of(row: Row) -> SparsePass:
    """The pass that a row would have."""
    ids = torch.from_numpy(row.ids.astype(np.int64))[None]
    targets = shifted(torch.from_numpy(row.labels)[None])
    config = LeMoConfig(policy="overlap")
    return SparsePass(config, tuple(ids.shape), ids.device, input_ids=ids, targets=targets)


def asking(sparse_pass: SparsePass, row: Row, who: str) -> Tensor:
    """``[1, T]`` bool: the tokens whose words are looked for."""
    if who == "both":
        return sparse_pass.asking_tokens
    labels = torch.from_numpy(row.labels)[None] != IGNORE_INDEX
    return labels if who == "answer" else torch.from_numpy(row.asking)[None]


def recalls(row: Row) -> dict[tuple[str, int, float], float]:
    """Of each variant at each retention."""
    sparse_pass = pass_of(row)
    size = sparse_pass.block_size
    gold = torch.from_numpy(row.gold_blocks(size))[None]
    found = {}
    for who, hops in VARIANTS:
        scores = overlap_scores(
            sparse_pass.input_ids, asking(sparse_pass, row, who), size, hops=hops
        )
        for retention in RETENTIONS:
            budget = num_kept_blocks(retention, sparse_pass.num_blocks)
            kept = keep_blocks(scores, sparse_pass.real, sparse_pass.required, budget)
            found[who, hops, retention] = float((kept & gold).sum() / gold.sum())
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("output", type=Path, help="JSON file")
    add(
        "--model",
        type=Path,
        required=True,
        help="directory made by make_base.py, for its tokenizer",
    )
    add("--data", type=Path, required=True, help="folder made by prepare.py")
    add("--tokens", type=int, default=32768)
    add("--rows", type=int, default=10, help="of each kind")
    args = parser.parse_args(argv)
    source = Source(Texts.load(args.data), AutoTokenizer.from_pretrained(args.model))
    rows = []
    for kind in tqdm(KINDS, desc="kinds"):
        some = [recalls(test_row(source, args.tokens, kind, index)) for index in range(args.rows)]
        for who, hops, retention in some[0]:
            values = [found[who, hops, retention] for found in some]
            mean = round(sum(values) / len(values), 4)
            names = {"kind": kind, "asks": who, "hops": hops, "retention": retention}
            rows.append({**names, "recall": mean})
    settings = {"tokens": args.tokens, "rows": args.rows}
    args.output.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")
    print(f"| asks, hops | retention | {' | '.join(KINDS)} |\n|{' --- |' * (len(KINDS) + 2)}")
    for who, hops in VARIANTS:
        for retention in RETENTIONS:
            key = {"asks": who, "hops": hops, "retention": retention}
            cells = [f"{r['recall']:.2f}" for r in rows if key.items() <= r.items()]
            print(f"| {who}, {hops} | {retention} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
