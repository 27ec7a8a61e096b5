"""Make a predictor of the blocks that labels need, measure it, and push it to the Hub if asked.

    python examples/train_predictor_and_push.py
    python examples/train_predictor_and_push.py --push me/my-predictor

By default it uses the repository's small model and a few rows of a book, in less than a minute on a
CPU. For a real run pass --model meta-llama/Llama-3.1-8B --data books.jsonl --tokens 8192
--block-size 64: the length, block size and kind of text that you will train with. By default
nothing is learned: tokens look for similar tokens. With --epochs 1 the predictor learns the model's
attention, which found less of what answers need (docs/predictors.md). `lemo train-predictor` does
the same in a shell.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf import LeMoConfig
from lemo_hf.storage.text_rows import load_documents, token_rows
from lemo_hf.tune.recall import recall_table
from lemo_hf.tune.train_predictor import PredictorTraining, train_predictor

DEMO = Path(__file__).parent / "demo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO / "model"), help="Hub id or directory")
    parser.add_argument("--data", default=str(DEMO / "text/train-alice-adams.txt"))
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a row")
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument(
        "--rows", type=int, default=68, help="rows, of which 4 are held out for recall"
    )
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument(
        "--push", metavar="REPOSITORY", help="repository to upload to; needs hf auth login"
    )
    parser.add_argument("--output", default="out/predictor")
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16 if gpu else torch.float32
    ).to("cuda" if gpu else "cpu")
    rows = token_rows(load_documents(args.data), tokenizer, args.tokens, max_rows=args.rows)

    how = PredictorTraining(
        block_size=args.block_size, epochs=args.epochs, batch_size=4, learning_rate=1e-3
    )
    predictor = train_predictor(model, rows[:-4], how, provenance={"datasets": [args.data]})

    # The share of the blocks the model looks at most that the predictor, or a rule, keeps too.
    table = recall_table(model, predictor, {"held-out rows": rows[-4:]})
    for row in table:
        print(
            f"layer {row['layer']}, retention {row['retention']}: recall of {row['policy']:9} "
            f"{row['recall']:.3f}"
        )
    predictor = predictor.with_recall(table)  # into the model card
    predictor.save_pretrained(args.output, repo_id=args.push)
    print(f"train with {LeMoConfig.from_pretrained(args.output)}")
    if args.push:
        print(predictor.push_to_hub(args.push))


if __name__ == "__main__":
    main()
