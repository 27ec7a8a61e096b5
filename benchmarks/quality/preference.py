"""A preference task whose answer the context supports: DPO dense and sparse, at equal time.

A prompt is a book with facts put into it and a question that asks for one; chosen is its number,
rejected the number of another fact. Held-out pairs are judged dense: is the right number likelier?
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.quality.completion_rows import TITLE
from benchmarks.quality.facts import LEXICAL_KINDS
from benchmarks.quality.model import ALPHA, RANK
from benchmarks.quality.row import Row, RowSet
from benchmarks.quality.rows import row_of
from benchmarks.quality.source import Source
from benchmarks.quality.texts import Texts
from benchmarks.record import GIB, command_line, environment, save

VALUE = LEXICAL_KINDS[0]


@dataclass(frozen=True)
class Pair:
    """Token ids of one preference."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def pair_of(row: Row, title: int, rng: np.random.Generator) -> Pair | None:
    """One of the row's questions for a number; ``title``: tokens of `TITLE`."""
    numbers = [i for i, kind in enumerate(row.kinds) if kind == VALUE]
    if len(numbers) < 2:
        return None
    asked, other = rng.choice(numbers, 2, replace=False)
    begin, end = row.answers[asked]
    start = row.asked_from + title
    if asked:  # a quotation is closed behind its answer
        start = row.answers[asked - 1][1] + (row.kinds[asked - 1] != VALUE)
    context = row.ids[: row.asked_from + title]
    question = row.ids[start:begin]
    wrong = row.ids[slice(*row.answers[other])]
    prompt = np.concatenate([context, question])
    return Pair(prompt.tolist(), row.ids[begin:end].tolist(), wrong.tolist())


def pairs(source: Source, rows: RowSet) -> Iterator[Pair]:
    """Without end."""
    title = len(source.encode(TITLE))
    for index in range(10**9):
        row = row_of(source, rows, index)
        found = pair_of(row, title, np.random.default_rng((rows.seed, index)))
        if found is not None:
            yield found


class Clock(TrainerCallback):
    """Ends a run after ``seconds``, counted from the end of the second step."""

    def __init__(self, seconds: float):
        self.seconds, self.began, self.steps, self.took = seconds, 0.0, 0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One more."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if state.global_step == 2:  # kernels are compiled and memory is there
            self.began = time.perf_counter()
        elif state.global_step > 2:
            self.steps, self.took = state.global_step - 2, time.perf_counter() - self.began
            control.should_training_stop |= self.took > self.seconds


@torch.no_grad()
def nats(model: Any, ids: Tensor, answer: int) -> Tensor:
    """``ids [B, T]``; of the last ``answer`` tokens, ``[B]``."""
    kind = ids.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        logits = model(input_ids=ids, logits_to_keep=answer + 1).logits[:, :-1].float()
    likely = logits.log_softmax(-1).gather(2, ids[:, -answer:, None])
    return -likely.sum((1, 2))


def judged(model: Any, held_out: list[Pair], device: torch.device) -> dict[str, float]:
    """Share of pairs whose right number is the likelier, and by how many nats in the mean."""
    model.eval()
    margins = []
    for pair in held_out:
        answers = (pair.chosen, pair.rejected)
        rows = torch.tensor([[*pair.prompt, *answer] for answer in answers], device=device)
        right, wrong = nats(model, rows, len(pair.chosen)).tolist()
        margins.append(wrong - right)
    share = sum(margin > 0 for margin in margins) / len(margins)
    return {"accuracy": round(share, 4), "margin": round(sum(margins) / len(margins), 3)}


def cut(prompt: list[int], share: float) -> list[int]:
    """The last ``share`` of a prompt, which the question ends: what truncation would leave."""
    return prompt[-max(1, round(share * len(prompt))) :]


def run_of(way: str, rate: float, seed: int, data: dict[str, list[Pair]], args: Any) -> dict:
    """Train in one way, and judge."""
    from peft import LoraConfig
    from trl import DPOConfig

    from benchmarks.token_pairs import token_pairs, trainer_class
    from lemo_hf import LeMoConfig

    device = torch.device("cpu" if args.cpu else "cuda")
    kind, _, share = way.partition(" ")
    dtype = torch.float32 if args.cpu else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype).to(device)
    if way == "base":
        return judged(model, data["test"], device)
    chosen = np.random.default_rng(seed).permutation(len(data["train"]))
    columns = {
        f"{name}_ids": [getattr(data["train"][i], name) for i in chosen]
        for name in ("prompt", "chosen", "rejected")
    }
    if kind == "cut":
        columns["prompt_ids"] = [cut(prompt, float(share)) for prompt in columns["prompt_ids"]]
    clock = Clock(args.seconds)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with TemporaryDirectory() as folder:
        trainer = trainer_class(kind == "lemo")(
            model=model,
            args=DPOConfig(
                output_dir=folder,
                max_steps=args.most_steps,
                per_device_train_batch_size=args.batch,
                max_length=None,
                learning_rate=rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=10,
                bf16=not args.cpu,
                use_cpu=args.cpu,
                gradient_checkpointing=False,
                seed=seed,
                logging_steps=20,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=token_pairs(columns, f"pairs {seed}"),
            processing_class=AutoTokenizer.from_pretrained(args.base),
            peft_config=lora,
            callbacks=[clock],
            **({"lemo_config": LeMoConfig(retention=float(share))} if kind == "lemo" else {}),
        )
        if not args.cpu:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    peak = 0.0 if args.cpu else torch.cuda.max_memory_allocated() / GIB
    speed = {"batch": args.batch, "steps": clock.steps, "seconds": round(clock.took, 1)}
    speed["peak_gib"] = round(peak, 2)
    return {**speed, **judged(trainer.model, data["test"], device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--base", type=Path, required=True, help="directory made by make_base.py")
    add("--texts", type=Path, required=True, help="folder made by prepare.py")
    add("--output", type=Path, required=True, help="a JSON file")
    add(
        "--runs",
        nargs="+",
        required=True,
        help="WAY:RATE:SEED, e.g. dense:1e-4:0, 'cut 0.3:…' or 'lemo 0.3:…'",
    )
    add("--tokens", type=int, default=8192, help="of a row from which a pair is made")
    add("--pairs", type=int, default=600, help="to train on")
    add("--held-out", type=int, default=96)
    add("--seconds", type=float, default=45.0, help="of training")
    add("--batch", type=int, default=1, help="pairs a step")
    add("--most-steps", type=int, default=600)
    add("--commit", default="unknown")
    add("--cpu", action="store_true")
    args = parser.parse_args()
    source = Source(Texts.load(args.texts), AutoTokenizer.from_pretrained(args.base))
    data = {}
    for split, count in (("train", args.pairs), ("test", args.held_out)):
        found = pairs(source, RowSet("lexical", args.tokens, split, 5))
        data[split] = [next(found) for _ in range(count)]
    here = environment(torch.device("cpu" if args.cpu else "cuda"))
    header = here | {"commit": args.commit, "tokens": args.tokens, "seconds": args.seconds}
    header["commands"] = [command_line("quality/preference.py", sys.argv[1:])]
    rows: list[dict] = []
    for name in args.runs:
        way, rate, seed = name.split(":")
        found_of = run_of(way, float(rate), int(seed), data, args)
        rows.append({"way": way, "rate": float(rate), "seed": int(seed), **found_of})
        print(json.dumps(rows[-1]), flush=True)
        save(args.output, header, rows)


if __name__ == "__main__":
    main()
