"""`lemo train`: YAML and flags give what LeMoTrainer gives in Python; mistakes are named."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from support.paths import ROOT
from support.train_run import MODEL, TEXT
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainingArguments,
    set_seed,
)

from lemo_hf import LeMoConfig, LeMoTrainer
from lemo_hf.cli.train_rows import collator, packed_rows
from lemo_hf.cli.train_settings import read_settings
from lemo_hf.storage.text_rows import token_rows


def python_losses(tmp_path, lemo_config, rows=None, lora=True):
    """What the same settings give without the command line."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    set_seed(3)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    if lora:
        options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    trainer = LeMoTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "python"),
            max_steps=3,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            seed=3,
            use_cpu=True,
        ),
        train_dataset=rows or token_rows([TEXT], tokenizer, 256, progress=False),
        data_collator=collator(tokenizer),
        lemo_config=lemo_config,
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def test_the_same_as_in_python_and_again_from_what_it_saved(lemo, tmp_path, config, capsys):
    lemo_config = LeMoConfig(retention=0.5, block_size=32, dense_first_layers=1)
    expected = python_losses(tmp_path, lemo_config)
    capsys.readouterr()
    code, out, err = lemo("train", "--config", config, "--json", "--training.hub_token", "hf_no")
    assert code == 0, err
    result = json.loads(out)  # nothing else is on stdout
    assert result["losses"] == expected
    saved = tmp_path / "out"
    assert (saved / "adapter_model.safetensors").is_file()
    assert LeMoConfig.from_pretrained(saved) == lemo_config
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model is None  # a directory's
    assert "## Training with LeMo" in card.text and "](lemo_train.yaml)" in card.text
    assert "### Training hyperparameters" in card.text
    text = (saved / "lemo_train.yaml").read_text()
    assert "hf_no" not in text and yaml.safe_load(text)["lemo"]["recompute"] is None
    again = ("train", "--config", saved / "lemo_train.yaml", "--output", tmp_path / "again")
    code, out, err = lemo(*again, "--json")
    assert code == 0 and json.loads(out)["losses"] == result["losses"], err


def test_flags_win(lemo, tmp_path, config):
    code, out, err = lemo(
        *("train", "--config", config, "--dry-run", "--tokens", 128, "--retention", 0.25),
        *("--lemo.policy=recent", "--training.learning_rate", "5e-4", "--training.warmup_steps", 2),
        *("--training.gradient-checkpointing", "--lora.target_modules", "[q_proj, v_proj]"),
        *("--model.rope_parameters", "{rope_type: linear, factor: 4}"),
    )
    assert code == 0, err
    found = yaml.safe_load(out)
    assert found["data"]["tokens"] == 128 and found["lemo"]["retention"] == 0.25
    assert found["lemo"]["policy"] == "recent" and found["lemo"]["block_size"] == 32
    assert found["training"]["learning_rate"] == 5e-4 and found["training"]["warmup_steps"] == 2
    assert found["training"]["activation_checkpointing"] is True  # its name since 5.23
    assert found["lora"]["target_modules"] == ["q_proj", "v_proj"] and found["lora"]["r"] == 4
    assert found["model"]["rope_parameters"] == {"rope_type": "linear", "factor": 4}
    assert not (tmp_path / "out").exists()


def test_dense_and_full(lemo, tmp_path, config):
    code, out, err = lemo("train", "--config", config, "--dense", "--full", "--json")
    assert code == 0, err
    assert json.loads(out)["losses"] == python_losses(tmp_path, None, lora=False)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(MODEL)
    assert not torch.equal(saved.lm_head.weight, before.lm_head.weight)
    text = (tmp_path / "out" / "lemo_train.yaml").read_text()
    assert yaml.safe_load(text)["full"] is True and yaml.safe_load(text)["lemo"] is False
    card = (tmp_path / "out" / "README.md").read_text()
    assert "### Training hyperparameters" in card and "LeMo" not in card


def test_flags_alone(lemo, config, tmp_path):
    book = tmp_path / "book.txt"
    flags = ("train", "--model", MODEL, "--dataset", book, "--tokens", 64, "--dry-run")
    code, _, err = lemo(*flags, "--output", "out")
    assert code == 2 and "must say what it trains" in err
    code, _, err = lemo(*flags, "--full")
    assert code == 2 and "--output DIR" in err
    code, out, err = lemo(*flags, "--output", "out", "--lora.r", 2)
    found = yaml.safe_load(out)
    assert code == 0 and found["lora"] == {"r": 2} and found["lemo"]["retention"] == 0.3, err
    assert f"# {MODEL} is a llama of 10 layers, 1,862,272 parameters and 512 positions." in out
    assert f"# {book} has rows of text." in out
    assert found["lemo"]["policy"] == "auto" and found["lemo"]["dense_finish"] is None
    finish = ("--lemo.dense_finish", 0.2, "--lemo.finish_retention", 0.5)
    code, out, err = lemo(*flags, "--output", "out", "--full", *finish, "--lemo.chunk_size", 1024)
    found = yaml.safe_load(out)["lemo"]
    assert code == 0, err
    values = [found[name] for name in ("dense_finish", "finish_retention", "chunk_size")]
    assert values == [0.2, 0.5, 1024]
    code, out, err = lemo(*flags, "--output", "out", "--full", "--lemo.threshold", 1.0)
    found = yaml.safe_load(out)["lemo"]
    assert code == 0 and found["policy"] == "pooled" and found["retention"] is None, err


def test_the_summary(lemo, config, tmp_path):
    code, out, err = lemo("train", "--config", config, "--training.max_steps", 1)
    assert code == 0, err
    assert "LoRA r=4" in out and "rows of 256 tokens, 2 a step" in out
    assert "9 of 10 layers" in out and "train_loss" in out and "rows of tokens" in err
    once = "the only step of this run is dense (the finish): take at least 2 steps to see LeMo's"
    assert once in " ".join(out.split())
    more = ("--lemo.dense_finish", 0, "--output", tmp_path / "out2")
    code, out, err = lemo("train", "--config", config, "--training.max_steps", 1, *more)
    assert code == 0 and "the only step" not in out, err


def test_why_no_step_would_be_made(lemo, config):
    code, _, err = lemo("train", "--config", config, "--training.max_steps", -1,
                        "--training.num_train_epochs", 0)  # fmt: skip
    assert code == 2 and "training.num_train_epochs=0 makes no step: give a number above 0" in err
    few = ("--data.max_rows", 2, "--training.per_device_train_batch_size", 8)
    code, _, err = lemo("train", "--config", config, *few, "--training.dataloader_drop_last")
    assert code == 2 and "2 rows are fewer than one of 8" in err and "label" not in err


def test_calibrated_config_to_start_from(config, tmp_path):
    LeMoConfig(threshold=0.7, block_size=16).save_pretrained(tmp_path / "calibrated")
    text = config.read_text()
    start = text.index("lemo:")
    config.write_text(
        text.replace(
            text[start : text.index("\n", start)], f"lemo: {{config: {tmp_path}/calibrated}}"
        )
    )
    run = read_settings(str(config)).build()
    assert (run.lemo.threshold, run.lemo.retention, run.lemo.block_size) == (0.7, None, 16)
    run = read_settings(str(config), ["--lemo.supervise", "all"]).build()
    assert (run.lemo.supervise, run.lemo.threshold) == ("all", 0.7)


def test_evaluation_and_resuming(lemo, tmp_path, config):
    shared = ("train", "--config", config, "--data.eval_dataset", tmp_path / "book.txt", "--json")
    shared = (*shared, "--data.max_eval_rows", 2, "--training.save_strategy", "steps")
    code, out, err = lemo(*shared, "--training.save_steps", 2, "--training.max_steps", 4)
    assert code == 0, err
    whole = json.loads(out)
    assert whole["metrics"]["eval_loss"] > 0 and (tmp_path / "out" / "checkpoint-4").is_dir()
    os.rename(tmp_path / "out" / "checkpoint-4", tmp_path / "gone")
    code, out, err = lemo(
        *shared, "--training.save_steps", 2, "--training.max_steps", 4, "--resume"
    )
    assert code == 0, err
    resumed = json.loads(out)
    assert resumed["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    assert resumed["metrics"]["eval_loss"] == pytest.approx(whole["metrics"]["eval_loss"], abs=1e-6)
    code, _, err = lemo(*shared, "--resume", "--output", tmp_path / "empty")
    assert code == 2 and "has no checkpoint" in err


def test_packed_documents_do_not_see_each_other():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    documents = [TEXT[:400], TEXT[1000:1500], TEXT[2000:2300]]
    (row, *_) = packed_rows(documents, tokenizer, 300)
    starts = [i for i, place in enumerate(row["position_ids"]) if place == 0]
    assert len(row["input_ids"]) == 300 and len(starts) >= 3
    assert [row["labels"][i] for i in starts] == [-100] * len(starts)
    tensors = {name: torch.tensor([values]) for name, values in row.items() if name != "labels"}
    with torch.no_grad():
        packed = model(**tensors, use_cache=False).logits[0]
        for first, end in zip(starts, [*starts[1:], 300], strict=True):
            alone = model(tensors["input_ids"][:, first:end]).logits[0]
            torch.testing.assert_close(packed[first:end], alone, atol=2e-4, rtol=1e-4)


def test_packing(lemo, tmp_path, config):
    lines = [json.dumps({"body": TEXT[i : i + 700]}) for i in range(0, 8000, 700)]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    more = ("--dataset", tmp_path / "short.jsonl", "--data.text_column", "body", "--json")
    code, out, err = lemo("train", "--config", config, *more, "--data.packing")
    assert code == 0, err
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [json.loads(line)["body"] for line in lines]
    rows = list(packed_rows(texts, tokenizer, 256))
    lemo_config = LeMoConfig(retention=0.5, block_size=32, dense_first_layers=1)
    assert json.loads(out)["losses"] == python_losses(tmp_path, lemo_config, rows)
    long = ("--tokens", 5000, "--output", tmp_path / "long")
    code, _, err = lemo("train", "--config", config, *more, *long, "--data.packing")
    assert code == 2 and "fewer than a row of 5000" in err


def test_rows_of_different_lengths_are_padded():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    batch = collator(tokenizer)([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]},
                                 {"input_ids": [5], "labels": [5]}])  # fmt: skip
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [5, -100, -100]]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--training.learning_rat", "1"), "did you mean 'learning_rate'?"),
        (("--lora.rank_patern", "{}"), "lora.rank_patern={}: there is no such key"),
        (("--lemo.retenton", "0.5"), "did you mean 'retention'?"),
        (("--data.token", "5"), "--data.token: data.token=5: there is no such key"),
        (("--trainin.bf16",), "did you mean 'training'?"),
        (("--retenton", "0.5"), "did you mean '--retention'?"),
        (("stray",), "stray: there is no such option"),
        (("--retention", "1.5"), "--retention: lemo: retention must lie in (0, 1], got 1.5"),
        (("--training.max_steps", "many"), "training.max_steps must be int, got 'many'"),
        (("--training.bf16", "7"), "training.bf16 must be bool, got 7"),
        (("--training.optim", "sgdd"), "--training.optim: training: sgdd is not a valid"),
        (("--lora.r", "0.5"), "lora.r must be int, got 0.5"),
        (("--model.dtype", "int4"), "model.dtype must be one of auto, bfloat16"),
        (("--lora.target_modules", "[q"), "--lora.target_modules is not valid YAML"),
        (("--lemo.threshold", "0.5", "--retention", "0.4"), "both say how much is kept"),
        (("--data.packing", "--data.min_tokens", "9"), "min_tokens=9 has no meaning with packing"),
        (("--model", "nowhere/at-all"), "model 'nowhere/at-all': "),
        (("--dataset", "none.jsonl"), "there is no file 'none.jsonl'"),
        (("--config", "lama3-8b-64k"), "did you mean 'llama3-8b-64k'?"),
    ],
)
def test_mistakes(flags, message, lemo, config, tmp_path):
    code, out, err = lemo("train", "--config", config, *flags)
    assert code == 2 and message in err and "Traceback" not in err and not out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_steps", "max_stepz"), "run.yaml: training.max_stepz=3: there is no such key; did"),
        (("lora:", "lorra:"), "there is no section 'lorra'; did you mean 'lora'?"),
        (("lora:", "full: false  #"), "full=False: give either a section lora"),
        (("tokens: 256", "tokens: long"), "run.yaml: data.tokens must be int, got 'long'"),
        ((", tokens: 256", ""), "run.yaml: data.tokens is missing"),
        (("seed: 3", "seed: 3\n  seed: 4"), "'seed' is given twice, again in line 14"),
        (("training:", "training: 5\nx:"), "training must be a mapping of keys, got 5"),
        (("{retention", "[retention"), "run.yaml is not valid YAML"),
    ],
)
def test_mistakes_in_the_file(change, message, lemo, config):
    config.write_text(config.read_text().replace(*change))
    code, _, err = lemo("train", "--config", config)
    assert code == 2 and message in err and "Traceback" not in err


def test_a_failure_is_no_mistake(lemo, config, monkeypatch):
    """Exit code 1 where memory runs out; other errors of the program keep their traceback."""

    def fail(error):
        def train(*_, **__):
            raise error

        monkeypatch.setattr(LeMoTrainer, "train", train)

    fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."))
    code, _, err = lemo("train", "--config", config)
    assert code == 1 and "Tried to allocate 2 GiB. Shorter rows" in err
    error = type("ConnectError", (Exception,), {"__module__": "httpx"})
    fail(error("[Errno -2] Name or service not known"))
    code, _, err = lemo("train", "--config", config)
    assert code == 1 and "the Hub cannot be reached (ConnectError: [Errno -2] Name or s" in err
    fail(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        lemo("train", "--config", config)


@pytest.mark.soak
def test_accelerate_launch(config, tmp_path):
    """Two processes share the rows; one of them writes."""
    options = ("--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no")
    options = (*options, "--dynamo_backend", "no", "--main_process_port", "0")
    command = ("-m", "lemo_hf.cli", "train", "--config", str(config), "--json", "--report")
    ended = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1 and json.loads(lines[0])["steps"] == 3
    saved = tmp_path / "out"
    assert (saved / "adapter_model.safetensors").is_file() and (saved / "report.html").is_file()
    assert len(json.loads((saved / "lemo_report.json").read_text())["rows"]) == 3
