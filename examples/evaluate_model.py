"""Evaluate a model: perplexity, retrieval of lines hidden in text, and LongBench.

    python examples/evaluate_model.py

By default it uses the repository's small model, a held-out book and one row of LongBench's
multi_news, in less than a minute on a CPU; so small a model answers next to nothing. For a real run
pass --model meta-llama/Llama-3.1-8B-Instruct (or the directory of an adapter) --data books.jsonl
--tokens 32768 --longbench hub --longbench-rows 0. `lemo eval` does the same in a shell.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf.eval.longbench import run_longbench
from lemo_hf.eval.needles import needle_rows
from lemo_hf.eval.perplexity import perplexity
from lemo_hf.eval.retrieval import retrieval
from lemo_hf.storage.text_rows import load_documents

DEMO = Path(__file__).parent / "demo"
LONGBENCH = DEMO.parent.parent / "tests/data/longbench/rows"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(DEMO / "model"), help="Hub id or directory")
    parser.add_argument("--data", default=str(DEMO / "text/heldout-oh-money-money.txt"))
    parser.add_argument("--tokens", type=int, default=512, help="tokens of context")
    parser.add_argument("--longbench", default=str(LONGBENCH), help="data: folder, zip, or 'hub'")
    parser.add_argument("--task", action="append", help="task of LongBench; repeatable")
    parser.add_argument("--longbench-rows", type=int, default=1, help="rows of each task; 0: all")
    parser.add_argument("--output", type=Path, default=Path("out/evaluation"))
    args = parser.parse_args()

    gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16 if gpu else torch.float32
    ).to("cuda" if gpu else "cpu")

    text = next(load_documents(args.data))
    document = tokenizer(text, verbose=False)["input_ids"][: 20 * args.tokens]
    loss = perplexity(model, [document], max_length=args.tokens)
    print(f"perplexity {loss.perplexity:.2f} over {loss.tokens:,} tokens")

    rows = needle_rows([text], tokenizer, lengths=[args.tokens], depths=[0.0, 0.5, 1.0], samples=2)
    found = retrieval(model, rows, batch_size=2)
    print(found.format_table())

    longbench = run_longbench(
        model,
        tokenizer,
        args.output / "longbench",
        args.task or ["multi_news"],
        data=None if args.longbench == "hub" else args.longbench,
        max_length=args.tokens,
        max_rows=args.longbench_rows or None,
    )
    print("LongBench:", longbench)

    result = {
        "perplexity": loss.to_dict(),
        "retrieval": found.to_dict(),
        "longbench": longbench,
    }
    (args.output / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
