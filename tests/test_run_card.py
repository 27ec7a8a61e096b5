"""The model card of a run: its facts against what is counted here; cards of others stay valid."""

import re
import time
from importlib.metadata import version

import pytest
import torch
from huggingface_hub import ModelCard
from support.models import batch, make_model, with_lora
from support.trainers import SPARSE, dataset, make_trainer
from transformers import Trainer, TrainerCallback
from transformers import trainer as trainer_module

from lemo_hf import LeMoConfig
from lemo_hf.cli.train_folder import clear
from lemo_hf.integrations.callback import LeMoCallback
from lemo_hf.report.callback import ReportCallback
from lemo_hf.run_card import _duration


def facts(folder):
    """The card's table."""
    text = (folder / "README.md").read_text()
    assert text.count("## Training with LeMo") == 1
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", text, re.MULTILINE))


def ragged():
    """Rows of 64 and 40 tokens."""
    rows = []
    for row, tokens in zip(dataset(), (64, 40) * 16, strict=True):
        ids = torch.tensor(row["input_ids"])
        mask = (torch.arange(64) < tokens).long()
        labels = ids.masked_fill(mask == 0, -100)
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return rows


def named(name):
    model = with_lora(make_model("llama"))
    model.get_base_model().config._name_or_path = name
    return model


def test_a_finish_that_was_not_reached_is_said(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    config = LeMoConfig(retention=0.5, block_size=8)
    trainer = make_trainer(tmp_path, config, max_steps=8, callbacks=[Stops()])
    trainer.train()
    trainer.save_model()
    assert facts(tmp_path)["finish"].endswith("; the run ended before, at step 2 of 8")


def test_the_facts(tmp_path):
    config = LeMoConfig(retention=0.5, block_size=8, policy="random", dense_finish=0.5)
    trainer = make_trainer(
        tmp_path, config, data=ragged(), model=named("me/base"), logging_steps=2,
        gradient_accumulation_steps=2, eval_dataset=dataset(4), callbacks=[ReportCallback()],
    )  # fmt: skip
    seen = []
    trainer.lemo.passes.tally.listeners.append(
        lambda x: seen.append((x.real_tokens, sum(int(n) for n in x.kept_tokens.values())))
    )
    started = time.perf_counter()
    trainer.train()
    most = time.perf_counter() - started
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    found = facts(tmp_path)
    assert found["base model"] == "me/base" and found["policy"] == "random"
    assert found["retention"] == "0.5"
    assert found["finish"] == "the last 50% of the steps keep everything"
    assert found["optimizer steps"].startswith("4, of 4 rows each")
    assert len(seen) == 8
    tokens, kept = (sum(counts) for counts in zip(*seen, strict=True))
    assert tokens <= 16 * 64 and tokens % 8 == 0
    trained = kept / 8  # of four layers two sublayers each
    assert found["tokens"] == (
        f"{tokens:,}; the mean layer trained {trained:,.0f} ({trained / tokens:.0%})"
    )
    assert 0 < float(found["time"].split(" s")[0]) <= most
    assert found["evaluation loss"] == f"{evaluated:.4g}"
    logs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert found["last training loss"] == f"{logs[-1]:.4g}"
    assert f"torch {version('torch')}" in found["versions"] and "peft" in found["versions"]
    text = (tmp_path / "README.md").read_text()
    assert "The last 50% of the steps are dense." in text  # as the run said at its start
    for name in ("report.html", "lemo_config.json"):
        assert f"]({name})" in text and (tmp_path / name).is_file()
    assert "lemo_train.yaml" not in text


def test_the_cards_of_peft_and_trainer(tmp_path):
    trainer = make_trainer(tmp_path, SPARSE, model=named("me/base"))
    trainer.train()
    trainer.save_model()
    card = ModelCard.load(tmp_path / "README.md")
    assert "## Model Details" in card.text and "PEFT" in card.text
    for _ in range(2):
        trainer.create_model_card(model_name="mine", tags=["of-the-user"])
        trainer.save_model()
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.library_name == "peft" and card.data.base_model == "me/base"
        assert {"lemo-hf", "lemo", "lora"} <= set(card.data.tags)
        assert len(card.data.tags) == len(set(card.data.tags))
        for heading in ("# mine", "### Training hyperparameters", "### Framework versions"):
            assert card.text.count(f"{heading}\n") == 1
        assert card.text.index("# mine") < card.text.index("## Training with LeMo")
        assert card.text.index("## Training with LeMo") < card.text.index("## Model description")
        assert facts(tmp_path)["base model"] == "me/base"


def test_all_parameters_of_a_model_from_a_directory(tmp_path):
    """Trainer writes no card when it saves; ours says nothing of where the model lay."""
    (tmp_path / "private" / "base").mkdir(parents=True)
    model = make_model("llama")
    model.config._name_or_path = str(tmp_path / "private" / "base")
    trainer = make_trainer(tmp_path / "run", SPARSE, model=model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    card = ModelCard.load(tmp_path / "saved" / "README.md")
    assert card.data.library_name == "transformers" and card.data.base_model is None
    assert card.text.startswith("# saved\n") and "private" not in card.content
    assert facts(tmp_path / "saved")["base model"] == "base, from a directory"
    assert not (tmp_path / "run" / "README.md").exists()
    trainer.create_model_card()
    assert "private" not in (tmp_path / "run" / "README.md").read_text()
    trainer.model.config._name_or_path = "me/base"
    trainer.save_model(str(tmp_path / "other"))
    assert ModelCard.load(tmp_path / "other" / "README.md").data.base_model == "me/base"


@pytest.mark.parametrize("lora", [True, False])
def test_the_callback_writes_it_too(tmp_path, lora):
    """As `LeMoTrainer` does, before others write a card: PEFT adds to it, Trainer makes it anew."""
    callback, tables = LeMoCallback(SPARSE), []
    for folder, config, options in (
        (tmp_path / "ours", SPARSE, {}),
        (tmp_path / "theirs", None, {"cls": Trainer, "callbacks": [callback]}),
    ):
        model = named("me/base") if lora else make_model("llama")
        how = {"gradient_accumulation_steps": 2, "logging_steps": 2, **options}
        trainer = make_trainer(folder, config, model=model, **how)
        trainer.train()
        trainer.save_model()
        tables.append(facts(folder))
    times = [table.pop("time") for table in tables]
    assert all(times) and tables[0] == tables[1]
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == ("peft" if lora else "transformers")
    trainer.create_model_card()
    assert "LeMo" not in (folder / "README.md").read_text()
    evaluated = trainer.evaluate(dataset(4))["eval_loss"]
    callback.add_to_card(folder)
    assert facts(folder)["evaluation loss"] == f"{evaluated:.4g}"
    assert "### Training hyperparameters" in (folder / "README.md").read_text()


def test_no_lemo_no_section(tmp_path):
    trainer = make_trainer(tmp_path, None, model=make_model("llama"))
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "README.md").exists()
    trainer.create_model_card()
    assert "LeMo" not in (tmp_path / "README.md").read_text()
    before = make_trainer(tmp_path / "before", SPARSE, model=make_model("llama"))
    before.save_model()  # nothing trained yet
    assert not (tmp_path / "before" / "README.md").exists()


@pytest.mark.parametrize("content", ["# My own\n\nWords.\n\n## More\n\nEnd.\n", "Words alone"])
def test_a_text_of_the_users(tmp_path, content):
    trainer = make_trainer(tmp_path, SPARSE, model=make_model("llama"))
    trainer.train()
    (tmp_path / "README.md").write_text(content)
    trainer.save_model()
    once = (tmp_path / "README.md").read_text()
    for line in content.splitlines():
        assert once.count(f"{line}\n") == 1 or not line
    trainer.save_model()
    again = (tmp_path / "README.md").read_text()
    assert again == once and facts(tmp_path)["optimizer steps"].startswith("4,")


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("when", ["before training", "after saving"])
def test_a_users_card_is_not_written_over(tmp_path, monkeypatch, caplog, lora, when):
    """Nor by `push_to_hub`, which makes a card: pushed is the user's, with the section."""
    pushed = []

    def upload_folder(*_, folder_path, **__):
        pushed.append(ModelCard.load(f"{folder_path}/README.md"))

    trainer = make_trainer(
        tmp_path, SPARSE, model=named("me/base") if lora else make_model("llama")
    )
    path, mine = tmp_path / "README.md", "---\nlicense: mit\n---\n\n# Mine\n\nWords.\n\n## More\n"
    if when == "before training":
        path.write_text(mine)
    trainer.train()
    trainer.save_model()
    if when == "after saving":
        path.write_text(mine)
    trainer.hub_model_id = "me/model"
    api = type("Api", (), {"upload_folder": staticmethod(upload_folder)})
    if hasattr(trainer_module, "hf_api"):
        monkeypatch.setattr(trainer_module, "hf_api", lambda: api)
    else:
        monkeypatch.setattr(trainer_module, "upload_folder", upload_folder)
    for make in (trainer.create_model_card, trainer.create_model_card, trainer.push_to_hub):
        make(language="de")
        text = path.read_text()
        for line in ("# Mine", "Words.", "## More", "license: mit"):
            assert text.count(f"{line}\n") == 1
        assert facts(tmp_path)["optimizer steps"].startswith("4,") and "automatically" not in text
    (card,) = pushed
    assert card.content == text and card.data.license == "mit" and "lemo-hf" in card.data.tags
    assert caplog.text.count("README.md is the user's: it stays") == 1
    path.unlink()
    trainer.create_model_card(language="de")
    assert "### Training hyperparameters" in path.read_text()


def test_a_dense_trainer_writes_its_card_as_trainer_does(tmp_path):
    trainer = make_trainer(tmp_path, None, model=make_model("llama"))
    (tmp_path / "README.md").write_text("# Mine\n")
    trainer.create_model_card()
    assert "Mine" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"---\na: [\n---\n", b"---\n- a\n---\n"])
def test_a_card_that_is_none_costs_no_weights(tmp_path, caplog, content):
    trainer = make_trainer(tmp_path, SPARSE, model=make_model("llama"))
    trainer.train()
    (tmp_path / "README.md").write_bytes(content)
    with caplog.at_level("WARNING"):
        trainer.save_model()
    assert "is left without what trained" in caplog.text
    assert (tmp_path / "README.md").read_bytes() == content
    assert (tmp_path / "model.safetensors").is_file()


def test_a_resumed_run_counts_all_of_it(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path, SPARSE, **settings)
    whole.train()
    whole.save_model()
    before = facts(tmp_path)
    resumed = make_trainer(tmp_path, SPARSE, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed.save_model()
    after = facts(tmp_path)
    for name in ("tokens", "optimizer steps", "last training loss"):
        assert after[name] == before[name]
    assert before["tokens"].startswith("512;")  # 4 steps of 2 rows of 64


def test_steps_that_were_not_logged(tmp_path):
    trainer = make_trainer(tmp_path, SPARSE, logging_steps=3)
    trainer.train()
    trainer.save_model()
    found = facts(tmp_path)
    assert found["tokens"].startswith("384 until step 3;")
    trainer = make_trainer(tmp_path, SPARSE, logging_steps=100)
    trainer.train()
    trainer.save_model()
    found = facts(tmp_path)
    assert "tokens" not in found and found["time"].endswith(" s")


def test_the_log_says_how_many_tokens_the_rows_had(tmp_path):
    inputs = {name: values[0] for name, values in batch(1, 64).items()}
    trainer = make_trainer(tmp_path, SPARSE, data=[inputs] * 8, gradient_accumulation_steps=2)
    trainer.train()
    logs = [line["lemo/tokens"] for line in trainer.state.log_history if "loss" in line]
    assert logs == [2 * 2 * 64] * 4


@pytest.mark.parametrize("ours", [True, False])
def test_a_run_that_starts_over_takes_its_own_card_away(tmp_path, ours):
    trainer = make_trainer(tmp_path, SPARSE if ours else None, model=make_model("llama"))
    trainer.train()
    trainer.create_model_card()
    clear(str(tmp_path))
    assert (tmp_path / "README.md").exists() != ours


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.1234, "0.123 s"),
        (59.6, "59.6 s"),
        (90.1, "2 min"),
        (3570, "1 h 0 min"),
        (7384, "2 h 3 min"),
    ],
)
def test_a_duration(seconds, said):
    assert _duration(seconds) == said
