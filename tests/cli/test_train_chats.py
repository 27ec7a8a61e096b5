"""`lemo train` of chats and instructions: the rows and labels are those of TRL's SFTTrainer."""

import json

import pytest
import yaml
from support.paths import DEMO

pytest.importorskip("trl", minversion="1.16")

import datasets
from support.sft import TEMPLATE, texts, turns
from transformers import AutoTokenizer

from lemo_hf.cli.train_look import METRICS_OF_CHATS, look
from lemo_hf.cli.train_settings import read_settings
from lemo_hf.cli.train_trainer import make_trainer

MODEL = str(DEMO / "model")
WORDS = [text.split() for text in texts(12)]  # halves end where a token does
HALVES = [(" ".join(w[: len(w) // 2]), " " + " ".join(w[len(w) // 2 :])) for w in WORDS]
SETTINGS = """
model: {name: MODEL, dtype: float32}
data: {dataset: [], tokens: 256, chat_template: chat.jinja}
lora: {r: 2, target_modules: [q_proj]}
lemo: {retention: 0.5, block_size: 16}
training: {output_dir: out, max_steps: 2, logging_steps: 1, use_cpu: true, save_strategy: no}
""".replace("MODEL", MODEL)


def sharegpt(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


ROWS = {
    "messages": [{"messages": turns(p, c) + turns(c, p)} for p, c in HALVES],
    "sharegpt": [{"id": "x", "conversations": sharegpt(p, c)} for p, c in HALVES],
    "texts": [{"prompt": p, "completion": c} for p, c in HALVES],
    "turns": [{"prompt": turns(p, c)[:1], "completion": turns(p, c)[1:]} for p, c in HALVES],
    "alpaca": [{"instruction": p, "input": "In short.", "output": c} for p, c in HALVES],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A file of each kind, a template, and caches of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    datasets.Dataset.from_list(ROWS["messages"]).to_parquet(tmp_path / "messages.parquet")
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    (tmp_path / "run.yaml").write_text(SETTINGS)
    return tmp_path


def trainer(*flags, dataset="messages.jsonl"):
    run = read_settings("run.yaml", [f"--data.dataset={dataset}", *flags]).build()
    return make_trainer(run, look(run), "", False)


def said(row):
    """What a row's labels say, and all of it."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    answers = [token for token in row["labels"] if token != -100]
    return tokenizer.decode(answers), tokenizer.decode(row["input_ids"])


END = AutoTokenizer.from_pretrained(MODEL).eos_token
P, C = HALVES[0]
WORDS_OF_A_ROW = " ".join(WORDS[0] * 8)
EXPECTED = {
    "messages.jsonl": (f"{C}{END}{P}{END}", f"user: {P}\n{C}{END}user: {C}\n{P}{END}"),
    "messages.parquet": (f"{C}{END}{P}{END}", f"user: {P}\n{C}{END}user: {C}\n{P}{END}"),
    "sharegpt.jsonl": (f"{C}{END}", f"user: {P}\n{C}{END}"),
    "texts.jsonl": (f"{C}{END}", f"{P}{C}{END}"),
    "turns.jsonl": (f"{C}{END}", f"user: {P}\n{C}{END}"),
    "alpaca.jsonl": (f"{C}{END}", f"user: {P}\n\nIn short.\n{C}{END}"),
}


@pytest.mark.parametrize("dataset", EXPECTED)
def test_each_kind_has_labels_on_its_answers(dataset, folder):
    assert said(trainer(dataset=dataset).train_dataset[0]) == EXPECTED[dataset]


def test_labels_on_everything(folder):
    for dataset in ("messages.jsonl", "texts.jsonl"):
        answers, row = said(trainer("--data.answers_only=false", dataset=dataset).train_dataset[0])
        assert answers == row == EXPECTED[dataset][1]


def test_alpaca_without_a_template_is_text(folder):
    row = said(trainer("--data.chat_template=null", dataset="alpaca.jsonl").train_dataset[0])
    assert row == (f"{C}{END}", f"{P}\n\nIn short.\n\n{C}{END}")


def test_it_trains(lemo, folder):
    (folder / "held.jsonl").write_text(json.dumps(ROWS["sharegpt"][0]))
    flags = ("--dataset", "messages.jsonl", "--data.eval_dataset", "held.jsonl", "--json")
    code, out, err = lemo("train", "--config", "run.yaml", *flags)
    assert code == 0, err
    result = json.loads(out)
    assert result["steps"] == len(result["losses"]) == 2 and result["metrics"]["eval_loss"] > 0
    assert "10 of 10 layers" in err and "labels on the answers" in err
    assert (folder / "out" / "adapter_model.safetensors").is_file()
    again = yaml.safe_load((folder / "out" / "lemo_train.yaml").read_text())
    assert again["data"]["eval_dataset"] == "held.jsonl"


@pytest.mark.parametrize("metric", METRICS_OF_CHATS)
def test_a_metric_that_is_taken_is_computed(metric, lemo, folder):
    best = ("--training.metric_for_best_model", metric, "--training.load_best_model_at_end")
    best = (*best, "--training.eval_strategy", "epoch", "--training.save_strategy", "epoch")
    flags = ("--dataset", "messages.jsonl", "--data.eval_share", 0.25, "--training.max_steps", 1)
    code, _, err = lemo("train", "--config", "run.yaml", *flags, *best)
    assert code == 0, err
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    (evaluated,) = {x[f"eval_{metric}"] for x in state["log_history"] if f"eval_{metric}" in x}
    assert state["best_metric"] == evaluated


def test_weights(folder):
    """Rows are drawn in these shares until one dataset has no more; forms become one."""
    mixed = "[sharegpt.jsonl, alpaca.jsonl]"
    rows = trainer("--data.weights=[3, 1]", dataset=mixed).train_dataset
    answers = [said(row)[1] for row in rows]
    short = sum("In short." in answer for answer in answers)
    assert len(answers) > 12 and 0 < short < len(answers) / 2
    assert EXPECTED["sharegpt.jsonl"][1] in answers and EXPECTED["alpaca.jsonl"][1] in answers


def test_a_share_is_held_out(folder):
    made = trainer("--data.eval_share=0.25", "--data.max_eval_rows=2")
    assert len(made.train_dataset) == 9 and len(made.eval_dataset) == 2
    known = [row["input_ids"] for row in made.train_dataset]
    assert all(row["input_ids"] not in known for row in made.eval_dataset)


def test_packing(folder):
    rows = trainer("--data.packing", "--data.max_rows=6").train_dataset
    assert len(rows) < 6 and all(len(row["input_ids"]) <= 256 for row in rows)
    assert sum(len(row["seq_lengths"]) for row in rows) == 6


def test_the_first_line_is_of_the_rows_that_train(folder):
    """Answers alone, text alone, both, and a stream of which nobody knows."""
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "a", "completion": WORDS_OF_A_ROW}))
    long = (folder / "long.jsonl").read_text()
    (folder / "both.jsonl").write_text(f"{long}\n{json.dumps(ROWS['texts'][0])}")
    for dataset, flags, asks in (
        ("messages.jsonl", (), True),
        ("messages.jsonl", ("--data.packing",), True),
        ("messages.jsonl", ("--data.answers_only=false",), False),
        ("long.jsonl", (), False),  # of which the prompt is next to nothing
        ("both.jsonl", (), None),
        ("messages.jsonl", ("--data.streaming",), None),
    ):
        made = trainer(*flags, dataset=dataset)
        assert made.lemo.asks is asks, (dataset, flags)
        both = "every block with a label where labels cover a part" in made.lemo.describe()
        assert both == (asks is None)


def test_a_stream(lemo, folder):
    made = trainer("--data.streaming", "--data.max_rows=5")
    assert not hasattr(made.train_dataset, "__len__")
    rows = [said(row) for row in made.train_dataset]
    assert len(rows) == 5 and EXPECTED["messages.jsonl"] in rows
    code, out, err = lemo(
        *("train", "--config", "run.yaml", "--dataset", "messages.jsonl", "--json"),
        *("--data.streaming", "--data.eval_dataset", "messages.parquet", "--data.eval_split=train"),
    )
    assert code == 0 and len(json.loads(out)["losses"]) == 2, err
    assert "a stream of rows" in err


def test_cut_answers_are_counted(folder, capsys):
    long = [{"prompt": "a b" * n, "completion": " c" * 20} for n in (1, 20, 60)]
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, long)))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    whole = [tokenizer(row["prompt"] + row["completion"] + END)["input_ids"] for row in long]
    tokens = len(whole[1]) - 5
    for more in ([], ["--data.streaming"]):
        rows = list(trainer(f"--data.tokens={tokens}", *more, dataset="long.jsonl").train_dataset)
        assert sorted(len(row["input_ids"]) for row in rows) == [len(whole[0]), tokens]
        printed = capsys.readouterr().out
        assert (
            f"3 rows are longer than data.tokens={tokens} and are cut. Answers lose their end in 2 "
            f"of them; 1 lose all labels and teach nothing. The longest row has {len(whole[2])}"
        ) in printed and "train: 2 of " in printed
    trainer(f"--data.tokens={len(whole[2])}", dataset="long.jsonl")
    assert "longer" not in capsys.readouterr().out


def test_text_columns_come_first_if_they_are_named(folder):
    both = [{**row, "text": "word " * 300} for row in ROWS["messages"]]
    (folder / "both.jsonl").write_text("\n".join(map(json.dumps, both)))
    assert said(trainer(dataset="both.jsonl").train_dataset[0]) == EXPECTED["messages.jsonl"]
    text = ("--data.text_column=text", "--data.chat_template=null")
    row = trainer(*text, dataset="both.jsonl").train_dataset[0]
    assert row["labels"] == row["input_ids"] and said(row)[0].startswith("word word")


@pytest.mark.parametrize(
    ("row", "flags", "message"),
    [
        ({"messages": turns("a", "b")[:1]}, (), "row 2 has no turn of the assistant"),
        ({"messages": [{"role": "user"}]}, (), "row 2: a message needs a role and a content"),
        ({"messages": []}, (), "row 2 must hold a list of messages, got []"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            (),
            "row 2: a message needs a role and a content, got",
        ),
        (None, ("--data.chat_template", "null"), "has no chat template: give one in data.chat_t"),
        (
            None,
            ("--data.chat_template", "plain.jinja"),
            "the chat template in data.chat_template='plain.jinja' does not mark what the assistan",
        ),
        (None, ("--data.chat_template", "chat.jinj"), "no file 'chat.jinj'; did you mean 'chat.j"),
        (None, ("--data.eval_dataset", "books.jsonl"), "some datasets hold chats and others text"),
        (None, ("--data.min_tokens", "9"), "data.min_tokens is for text that is cut"),
        (None, ("--dataset", "books.jsonl"), "data.chat_template is for chats, and the rows are"),
        (None, ("--data.streaming", "--training.max_steps=-1"), "no last row: set training.max_s"),
        (None, ("--data.weights", "[1]"), "weights=[1.0] must hold a number above 0 for each"),
        (None, ("--data.eval_share=1.5",), "eval_share must lie in (0, 1), got 1.5"),
        (
            None,
            ("--training.metric_for_best_model", "eval_mean_token_acuracy"),
            "'eval_mean_token_acuracy': evaluation of chats computes loss, mean_token_accuracy and "
            "entropy; did you mean 'mean_token_accuracy'?",
        ),
    ],
)
def test_mistakes(row, flags, message, lemo, folder):
    (folder / "plain.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (folder / "books.jsonl").write_text(json.dumps({"text": "a"}))
    rows = [ROWS["messages"][0]] + ([] if row is None else [row])
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mine = () if "--dataset" in flags else ("--dataset", "mine.jsonl")
    code, _, err = lemo("train", "--config", "run.yaml", *mine, *flags)
    assert code == 2 and message in err and "Traceback" not in err
    assert not (folder / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_line_is_named(streaming, lemo, folder):
    (folder / "cut.jsonl").write_text(json.dumps(ROWS["texts"][0]) + '\n{"prompt": "a"')
    code, _, err = lemo(
        *("train", "--config", "run.yaml", "--dataset", "cut.jsonl", "--data.streaming", streaming)
    )
    assert code == 2 and "cut.jsonl, line 2 is not valid JSON" in err and "Traceback" not in err


def test_files_of_other_columns_and_other_encodings(lemo, folder):
    mixed = ("--dataset", "texts.jsonl", "--dataset", "messages.jsonl")
    code, _, err = lemo("train", "--config", "run.yaml", *mixed)
    assert code == 2 and "files that are read as one need the same columns" in err
    rows = [json.dumps(ROWS["texts"][0]), '{"prompt": "caf\xe9", "completion": "b"}']
    (folder / "latin.jsonl").write_bytes("\n".join(rows).encode("latin-1"))
    code, _, err = lemo("train", "--config", "run.yaml", "--dataset", "latin.jsonl")
    assert code == 2 and "latin.jsonl is not all UTF-8" in err and "Traceback" not in err


@pytest.mark.parametrize("column", ["instruction", "input"])
def test_alpaca_without_text(column, lemo, folder):
    (folder / "numbers.jsonl").write_text(json.dumps({**ROWS["alpaca"][0], column: 5}))
    code, _, err = lemo("train", "--config", "run.yaml", "--dataset", "numbers.jsonl")
    assert code == 2 and f"numbers.jsonl, row 1: column '{column}' must hold text, got 5" in err


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_lose_all_labels_train_nothing(streaming, lemo, folder):
    long = [{"prompt": "a b" * 99, "completion": " c"}] * 3
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, long)))
    flags = ("train", "--config", "run.yaml", "--data.tokens", 32, "--data.streaming", streaming)
    code, _, err = lemo(*flags, "--dataset", "long.jsonl")
    said = "no step was made" if streaming else "train: none of 3 rows has a label within"
    assert code == 2 and said in err and "Traceback" not in err
    assert not (folder / "out" / "adapter_model.safetensors").exists()
    heldout = ("--dataset", "texts.jsonl", "--data.eval_dataset", "long.jsonl")
    if not streaming:
        code, _, err = lemo(*flags, *heldout)
        assert code == 2 and "eval: none of 3 rows has a label within" in err


def test_without_trl(lemo, folder, monkeypatch):
    monkeypatch.setattr("lemo_hf.cli.train_look.find_spec", lambda name: None)
    code, _, err = lemo("train", "--config", "run.yaml", "--dataset", "messages.jsonl")
    assert code == 2 and 'chats and instructions need TRL: pip install "lemo-hf[trl]"' in err
