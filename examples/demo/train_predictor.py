"""Train a predictor for the demo's model, and measure its recall.

    python examples/demo/train_predictor.py --output examples/demo/predictor

Quick on a GPU, minutes on two CPU cores. It learns from the books that the demo trains on; recall
is that of the books the demo holds out.
"""

import argparse
from pathlib import Path

import torch
import transformers
from setting import HERE, load_model, rows
from transformers import AutoTokenizer

from lemo_hf.tune.recall import recall_table
from lemo_hf.tune.train_predictor import PredictorTraining, train_predictor


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=1)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "model")
    train, heldout = (
        [row["input_ids"] for row in rows(tokenizer, f"{name}-*.txt")]
        for name in ("train", "heldout")
    )
    model = load_model().to("cuda" if torch.cuda.is_available() else "cpu")
    how = PredictorTraining(
        layers=(2,), rank=32, asking=8, epochs=args.epochs, batch_size=2, learning_rate=1e-3
    )
    facts = {
        "texts": "examples/demo/text",
        "command": f"python examples/demo/train_predictor.py --output {args.output}",
    }
    predictor = train_predictor(model, train, how, provenance=facts)
    table = recall_table(model, predictor, {"held-out books": heldout[::4]})
    for row in table:
        print(f"{row['policy']:10} {row['retention']} {row['recall']:.3f}")
    predictor.with_recall(table).save_pretrained(args.output)


if __name__ == "__main__":
    main()
