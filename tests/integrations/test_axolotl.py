"""`LeMoPlugin` under Axolotl's own plugin manager, config schema and trainer.

Axolotl pins other versions of what lemo-hf needs, so CI installs it without its dependencies.
"""

import pytest
from support.models import make_model, with_lora
from support.paths import ROOT
from support.trainers import dataset, losses, make_trainer

base = pytest.importorskip("axolotl.integrations.base")

from datasets import Dataset  # noqa: E402
from transformers import AutoTokenizer, Trainer  # noqa: E402

from lemo_hf import LeMoConfig  # noqa: E402
from lemo_hf.integrations.axolotl import LeMoPlugin  # noqa: E402
from lemo_hf.integrations.callback import LeMoCallback  # noqa: E402
from lemo_hf.patch import lemo_of  # noqa: E402
from lemo_hf.trainer import LeMoMixin  # noqa: E402

NAME = "lemo_hf.integrations.axolotl.LeMoPlugin"


@pytest.fixture
def manager(monkeypatch):
    """A manager of its own, as Axolotl has one a process."""
    monkeypatch.setattr(base.PluginManager, "_instance", None)
    found = base.PluginManager.get_instance()
    found.register(NAME)
    return found


def validated(**keys):
    """A config as Axolotl's schema passes it on."""
    config = pytest.importorskip("axolotl.utils.config")
    from axolotl.utils.dict import DictDefault

    settings = {
        "base_model": "any/model",
        "plugins": [NAME],
        "datasets": [{"path": "books.jsonl", "type": "completion"}],
        "learning_rate": 1e-2,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "attn_implementation": "sdpa",
        **keys,
    }
    return config.validate_config(DictDefault(settings))


def test_the_plugin_is_axolotls(manager):
    plugin = manager.plugins[NAME]
    assert type(plugin) is LeMoPlugin and isinstance(plugin, base.BasePlugin)
    assert manager.get_input_args() == ["lemo_hf.integrations.axolotl.LeMoArgs"]


def test_the_config_comes_through_axolotls_schema(manager):
    cfg = validated(lemo={"retention": [1, 0.5], "agree_across_layers": False, "block_size": 8})
    (callback,) = manager.add_callbacks_pre_trainer(cfg, model=None)
    assert isinstance(callback, LeMoCallback)
    assert callback.lemo_config == LeMoConfig(
        retention=(1, 0.5), agree_across_layers=False, block_size=8
    )
    (callback,) = manager.add_callbacks_pre_trainer(validated(), model=None)
    assert callback.lemo_config == LeMoConfig()


def test_a_wrong_value_is_said_when_the_config_is_read(manager):
    with pytest.raises(ValueError, match="retention must lie in"):
        validated(lemo={"retention": 1.5})
    with pytest.raises(ValueError, match="unknown keys in a LeMoConfig: blocksize"):
        validated(lemo={"blocksize": 8})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rl": "dpo"}, r"rl: dpo is not supported.*reference model"),
        ({"activation_offloading": True}, r"activation_offloading.*offload_gib"),
        ({"sample_packing": True, "attn_implementation": "x"}, r"attn_implementation: x.*flash"),
    ],
)
def test_what_goes_against_it_is_refused_by_name(manager, keys, message):
    with pytest.raises(ValueError, match=message):
        manager.add_callbacks_pre_trainer({"lemo": None, **keys}, model=None)


def test_the_card_that_axolotl_makes_anew_has_what_trained(manager, tmp_path):
    cfg = validated(lemo={"block_size": 8}, output_dir=str(tmp_path))
    manager.post_train(cfg, None)  # of another command than training
    assert not (tmp_path / "README.md").exists()
    callbacks = manager.add_callbacks_pre_trainer(cfg, model=None)
    trainer = make_trainer(tmp_path, None, cls=Trainer, callbacks=callbacks)
    trainer.train()
    trainer.create_model_card()
    assert "## Training with LeMo" not in (tmp_path / "README.md").read_text()
    manager.post_train(cfg, trainer.model)
    assert "## Training with LeMo" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("retention", [1.0, 0.5])
def test_axolotls_trainer_trains_as_ours(manager, request, tmp_path, retention, packing):
    trainers = pytest.importorskip("axolotl.core.trainers.base")
    arguments = pytest.importorskip("axolotl.core.training_args")
    from axolotl.monkeypatch.data import batch_dataset_fetcher
    from axolotl.utils.collators.batching import V2BatchSamplerDataCollatorForSeq2Seq

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/demo/model")
    cfg = validated(lemo={"retention": retention, "block_size": 8, "policy": "random"})
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 7,
        "disable_tqdm": True,
        "report_to": "none",
        "sample_packing": packing,
        "sample_packing_drop_attention_mask": packing,
        "eval_sample_packing": packing,
        "max_seq_length": 64,
        "dataset_num_proc": 1,
    }
    rows = [
        {name: column[: 20 + 3 * (i % 5)] for name, column in row.items()}
        for i, row in enumerate(dataset())
    ]
    for row in rows:
        row["position_ids"] = list(range(len(row["input_ids"])))
        row["length"] = len(row["input_ids"])

    def make(cls, **own):
        return cls(
            model=with_lora(make_model("llama", "sdpa")),
            args=arguments.AxolotlTrainingArguments(**settings),
            train_dataset=Dataset.from_list(rows),
            data_collator=V2BatchSamplerDataCollatorForSeq2Seq(tokenizer),
            **own,
        )

    batch_dataset_fetcher.apply_multipack_dataloader_patch()
    request.addfinalizer(batch_dataset_fetcher.remove_multipack_dataloader_patch)
    callbacks = manager.add_callbacks_pre_trainer(cfg, model=None)
    theirs = make(trainers.AxolotlTrainer, callbacks=callbacks)
    found = losses(theirs)
    assert lemo_of(theirs.model) is None
    expected = losses(make(trainers.AxolotlTrainer))
    if retention == 1:
        assert found == pytest.approx(expected, rel=1e-4)
    else:
        mixed = type("Mixed", (LeMoMixin, trainers.AxolotlTrainer), {})
        ours = make(mixed, lemo_config=LeMoConfig.from_dict(dict(cfg.lemo)))
        assert found == losses(ours) and found != expected
        assert theirs.state.log_history[0]["lemo/attention_retention"] < 0.9
