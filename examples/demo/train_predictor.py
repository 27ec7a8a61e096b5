"""Train a predictor for the demo's model, and measure its recall.

    python examples/demo/train_predictor.py --output examples/demo/predictor

Quick on a GPU, most of an hour on two CPU cores. It learns from the books that the demo trains on;
recall is that of the books the demo holds out.
"""

import argparse
import dataclasses
from pathlib import Path

import torch
import transformers
from setting import HERE, load_model, rows
from transformers import AutoTokenizer

from lemo_hf.eval.plots import recall_figure, save_figure
from lemo_hf.recall import recall_table
from lemo_hf.train_predictor import PredictorTraining, train_predictor

TRAINING = PredictorTraining(
    units=64, rank=16, epochs=12, batch_size=4, learning_rate=5e-3, rarely=0.05
)


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=TRAINING.epochs)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    train, heldout = (
        [row["input_ids"] for row in rows(tokenizer, f"{name}-*.txt")]
        for name in ("train", "heldout")
    )
    model = load_model().to("cuda" if torch.cuda.is_available() else "cpu")
    how = dataclasses.replace(TRAINING, epochs=args.epochs)
    facts = {
        "datasets": [],
        "texts": "examples/demo/text",
        "command": f"python examples/demo/train_predictor.py --output {args.output}",
    }
    predictor = train_predictor(model, train, how, provenance=facts)
    table = recall_table(model, predictor, {"held-out books": heldout})
    for row in table:
        print(f"{row['policy']:10} {row['retention']} {row['mean']:.3f} {row['least']:.3f}")
    picture = args.output / "recall.png"
    args.output.mkdir(parents=True, exist_ok=True)
    save_figure(recall_figure(table), picture)
    predictor.with_recall(table).save_pretrained(args.output, plot=picture)


if __name__ == "__main__":
    main()
