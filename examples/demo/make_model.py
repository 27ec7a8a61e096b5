"""Make the demo's texts, tokenizer and model from a folder of public-domain books.

The demo needs a real language model that is small enough to ship in the repository and to run on
a CPU. This script records how that model came to be, one step per command:

    texts      cut the demo's own documents out of the books (written next to this script)
    tokenizer  train the tokenizer on all *other* books and turn them into one array of tokens
    train      pretrain a small Llama on that array, with 512 tokens of context
    report     copy the numbers of a training run into PROVENANCE.md

The demo extends the model to longer contexts, so its texts must be new to the model: the
`tokenizer` step leaves them out by document id and fails if one of them gets through.
"""

import argparse
import json
import lzma
import math
import platform
import re
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
EOS = "</s>"
CONTEXT = 512

# The demo's documents: file, document id, where the text starts, bytes to keep (None: to the end).
DEMO_TEXTS = [
    ("train-anne-of-the-island.txt", "md_Lucy_Maud_Montgomery__Anne_of_the_Island", "", None),
    ("train-scarhaven-keep.txt", "md_J_S_Fletcher__Scarhaven_Keep", "", None),
    ("train-alice-adams.txt", "md_Booth_Tarkington__Alice_Adams", "", None),
    (
        "heldout-the-foresters-daughter.txt",
        "pg19test_26239_The_Forester_s_Daughter",
        "\nTHE HAPPY GIRL\n",
        250_000,
    ),
    ("heldout-oh-money-money.txt", "pg19test_5962_Oh_Money_Money", "\nCHAPTER I\n", 250_000),
]
DEMO_IDS = {document_id for _, document_id, _, _ in DEMO_TEXTS}

# Books differ in their typography. One spelling for each mark spends fewer of the few tokens.
MARKS = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "--",
        "\u2026": "...",
        "\u00a0": " ",
        "\u200a": "",
        "\u2060": "",
    }
)


def normalise(text):
    """Spell quotes and dashes in ASCII and undo hard line wrapping.

    A paragraph counts as wrapped if all its lines but the last are at least 45 characters long;
    verse, letter heads and tables have shorter lines and keep them.
    """
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text.translate(MARKS)):
        lines = paragraph.strip("\n").split("\n")
        if all(len(line) >= 45 for line in lines[:-1]):
            lines = [" ".join(line.strip() for line in lines)]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(p for p in paragraphs if p.strip()) + "\n"


def read_books(path):
    """Yield the rows (id, title, author, source, licence, text) of a `.jsonl.xz` file."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def make_texts(args):
    """Write the demo's documents and a table of their origins."""
    books = {}
    for path in ("books-finetune.jsonl.xz", "books-test.jsonl.xz"):
        books.update((row["id"], row) for row in read_books(args.corpus / path))
    folder = HERE / "text"
    folder.mkdir(exist_ok=True)
    table = []
    for name, document_id, start, size in DEMO_TEXTS:
        row = books[document_id]
        text = normalise(row["text"][row["text"].index(start) :])
        if size is not None:
            text = text.encode()[:size].decode(errors="ignore")
            text = text[: text.rindex("\n\n") + 1]
        (folder / name).write_text(text, encoding="utf-8")
        role = "fine-tuning" if name.startswith("train-") else "held-out perplexity"
        part = "whole book" if size is None else "opening part, cut at a paragraph"
        licence = row["licence"].split(" (")[0]
        cells = [f"`{name}`", row["title"], row["author"], row["source"], licence]
        table.append("| " + " | ".join([*cells, f"{len(text.encode()):,}", part, role]) + " |")
    (folder / "SOURCES.md").write_text(SOURCES.format(table="\n".join(table)), encoding="utf-8")


SOURCES = """# Sources of the demo's texts

| file | title | author | source | licence | bytes | part | role |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}

None of these documents was used to train the demo's tokenizer or model. The held-out files are
not used for fine-tuning either. The texts are in English, one paragraph per line: hard line
wrapping is undone, and quotation marks and dashes are written in ASCII. The held-out files begin
at the first chapter, without the title pages. Written by `make_model.py texts`.
"""


def make_tokenizer(args):
    """Train a byte-level BPE tokenizer and write the pretraining corpus as uint16 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    rows = read_books(args.corpus / "books-finetune.jsonl.xz")
    books = [row for row in rows if row["id"] not in DEMO_IDS]
    assert not DEMO_IDS & {b["id"] for b in books}, "a demo text is in the pretraining corpus"
    texts = [normalise(b["text"]) for b in books]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = args.output / "tokenizer"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)
    fast.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.encode(texts[0][:9999])) == texts[0][:9999]
    tokens = []
    for text in texts:
        tokens.append(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        tokens[-1].append(tokenizer.eos_token_id)
    array = np.concatenate([np.array(t, dtype=np.uint16) for t in tokens])
    np.save(args.output / "tokens.npy", array)
    for book, text, ids in zip(books, texts, tokens, strict=True):
        book.update(bytes=len(text.encode()), tokens=len(ids))
        del book["text"]
    info = {
        "tokens": len(array),
        "bytes": sum(b["bytes"] for b in books),
        "excluded": sorted(DEMO_IDS),
        "documents": books,
    }
    (args.output / "corpus.json").write_text(json.dumps(info, indent=1) + "\n")
    print(
        f"{len(books)} documents, {info['bytes']:,} bytes, {len(array):,} tokens -> {args.output}"
    )


def build_model(args, tokenizer):
    """Return a randomly initialised Llama with the demo's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    # Set here and not in the config, where it would exclude the embedding from training.
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def held_out_loss(model, tokens, batch, device):
    """Mean cross-entropy over consecutive windows of `CONTEXT` tokens."""
    import torch

    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total = 0.0
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for part in windows.split(batch):
            total += model(part, labels=part, use_cache=False).loss.item() * len(part)
    return total / len(windows)


def train(args):
    """Pretrain the model for a given time and write model, tokenizer and `train_log.json`."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.data / "tokenizer")
    corpus = json.loads((args.data / "corpus.json").read_text())
    assert not DEMO_IDS & {d["id"] for d in corpus["documents"]}, "a demo text is in the corpus"
    tokens = torch.from_numpy(np.load(args.data / "tokens.npy").astype(np.int64)).to(device)
    split = len(tokens) - len(tokens) // 100
    data, validation = tokens[:split], tokens[split:][: args.validation_tokens]

    model = build_model(args, tokenizer).to(device)
    parameters = model.num_parameters()
    print(f"{parameters:,} parameters, {split:,} training tokens, {device}", flush=True)
    step_model = torch.compile(model) if args.compile else model
    # Norms are one-dimensional and are not decayed.
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")
    window = torch.arange(CONTEXT, device=device)

    # The number of steps follows from the time of 20 steps, measured after the slow first ones.
    first, timed = (3, 20) if args.max_steps is None else (1, 1)
    steps = None
    history = []
    start = time.perf_counter()
    step = 0
    while steps is None or step < steps:
        warm = min(1.0, (step + 1) / args.warmup)
        progress = step / steps if steps else 0.0
        rate = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        offsets = torch.randint(len(data) - CONTEXT + 1, (args.batch, 1), device=device)
        batch = data[offsets + window]
        with torch.autocast(device.type, torch.bfloat16):
            loss = step_model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step in (first, first + timed):
            loss.item()  # wait for the device before reading the clock
            now = time.perf_counter()
            if step == first:
                timer = now
            else:
                seconds = (now - timer) / timed
                steps = step + max(1, int((args.seconds - (now - start)) / seconds))
                steps = min(steps, args.max_steps or steps)
                print(f"{seconds:.4f} s per step -> {steps} steps", flush=True)
        if step % args.print_every == 0 or step == steps:
            history.append([step, round(loss.item(), 4), round(time.perf_counter() - start, 1)])
            print(f"step {step}  loss {loss.item():.3f}  lr {rate:.1e}", flush=True)
    seconds = time.perf_counter() - start

    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    # What counts is the file, so the held-out loss is that of the saved bf16 checkpoint.
    model = AutoModelForCausalLM.from_pretrained(args.output).to(device).eval()
    loss = held_out_loss(model, validation, args.batch, device)
    log = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "parameters": parameters,
        "training_tokens": split,
        "steps": step,
        "tokens_per_step": args.batch * CONTEXT,
        "tokens_seen": step * args.batch * CONTEXT,
        "seconds": round(seconds, 1),
        "final_train_loss": history[-1][1],
        "validation_tokens": len(validation) // CONTEXT * CONTEXT,
        "validation_loss": round(loss, 4),
        "validation_perplexity": round(math.exp(loss), 2),
        "options": {k: v for k, v in vars(args).items() if isinstance(v, (int, float, bool))},
        "history_step_loss_seconds": history,
        "excluded_documents": corpus["excluded"],
        "documents": [d["id"] for d in corpus["documents"]],
    }
    (args.output / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(f"validation loss {loss:.3f}, perplexity {math.exp(loss):.2f}, {seconds:.0f} s")
    print(f"{sum(f.stat().st_size for f in args.output.iterdir()):,} bytes in {args.output}")


def report(args):
    """Fill the marked part of PROVENANCE.md from a `train_log.json`."""
    log = json.loads((args.model / "train_log.json").read_text())
    versions = ", ".join(f"{k} {v}" for k, v in log.pop("versions").items())
    rows = [("versions", versions)]
    rows += [(k.replace("_", " "), v) for k, v in log.items() if not isinstance(v, (dict, list))]
    lines = ["| | |", "| --- | --- |"]
    for key, value in rows:
        lines.append(f"| {key} | {value:,} |" if isinstance(value, int) else f"| {key} | {value} |")
    path = HERE / "PROVENANCE.md"
    begin, end = "<!-- numbers: begin -->", "<!-- numbers: end -->"
    text = path.read_text(encoding="utf-8")
    head, tail = text.split(begin)[0], text.split(end)[1]
    path.write_text(head + "\n".join([begin, "", *lines, "", end]) + tail, encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)

    step = commands.add_parser("texts", help="write the demo's documents")
    step.add_argument("--corpus", type=Path, required=True, help="folder of books-*.jsonl.xz")
    step.set_defaults(run=make_texts)

    step = commands.add_parser("tokenizer", help="train the tokenizer, tokenise the corpus")
    step.add_argument("--corpus", type=Path, required=True, help="folder of books-*.jsonl.xz")
    step.add_argument("--output", type=Path, required=True, help="folder for tokenizer and tokens")
    step.add_argument("--vocab-size", type=int, default=2048)
    step.set_defaults(run=make_tokenizer)

    step = commands.add_parser("train", help="pretrain the model")
    step.add_argument("--data", type=Path, required=True, help="output of the tokenizer step")
    step.add_argument("--output", type=Path, required=True, help="folder for the model")
    step.add_argument("--seconds", type=float, default=120, help="time for all steps together")
    step.add_argument("--max-steps", type=int, help="upper bound, for a quick trial")
    step.add_argument("--batch", type=int, default=256, help=f"sequences of {CONTEXT} per step")
    step.add_argument("--lr", type=float, default=3e-3)
    step.add_argument("--warmup", type=int, default=100, help="steps of rising learning rate")
    step.add_argument("--layers", type=int, default=10)
    step.add_argument("--hidden", type=int, default=128)
    step.add_argument("--mlp", type=int, default=288)
    step.add_argument("--heads", type=int, default=4)
    step.add_argument("--kv-heads", type=int, default=2)
    step.add_argument("--validation-tokens", type=int, help="use only the first so many")
    step.add_argument("--print-every", type=int, default=100, help="steps between two lines")
    step.add_argument("--seed", type=int, default=0)
    step.add_argument("--compile", action="store_true", help="torch.compile the model")
    step.set_defaults(run=train)

    step = commands.add_parser("report", help="copy a run's numbers into PROVENANCE.md")
    step.add_argument("--model", type=Path, required=True, help="folder with train_log.json")
    step.set_defaults(run=report)

    args = parser.parse_args()
    if "output" in args:
        args.output.mkdir(parents=True, exist_ok=True)
    args.run(args)


if __name__ == "__main__":
    main()
