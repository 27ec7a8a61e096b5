"""Predictors in files: what is saved is what is loaded, and nothing that is wrong is loaded."""

import json
import logging
import pickle
import re
from pathlib import Path

import pytest
import torch
from hub_client import BASE, make_predictor
from models import batch, make_model, with_lora
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_trainer import adapter, losses, make_trainer
from transformers import AutoConfig

from lemo_hf import LeMoConfig, LeMoPredictor, apply_lemo
from lemo_hf.files import CONFIG_NAME as CONFIG
from lemo_hf.files import WEIGHTS_NAME as WEIGHTS
from lemo_hf.policies import POLICIES
from lemo_hf.predictors import predictor_files, registry
from lemo_hf.predictors.base_model import BaseModel

ROOT = Path(__file__).parent.parent
LEARNED = LeMoConfig(policy="predictor", block_size=8)


@pytest.fixture
def saved(tmp_path):
    make_predictor(dense=[0]).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change_config(directory, change):
    values = json.loads((directory / CONFIG).read_text())
    change(values)
    (directory / CONFIG).write_text(json.dumps(values))


def change_tensors(directory, change):
    """Change the tensors, and the checksum with them, so that only the change is wrong."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS)
    digest = predictor_files._sha256(directory / WEIGHTS)
    change_config(directory, lambda values: values["predictor"].update(sha256=digest))


def refused(directory, *texts):
    with pytest.raises(ValueError) as error:
        LeMoPredictor.from_pretrained(directory)
    for text in texts:
        assert re.search(text, str(error.value)), str(error.value)


@pytest.mark.parametrize("mlp", [False, True])
def test_what_is_loaded_is_what_was_saved(tmp_path, mlp):
    row = {"documents": "books", "head": "attention", "retention": 0.5, "policy": "predictor"}
    recall = [{**row, "mean": 0.9, "least": 0.8, "layers": [0.8, 1.0, None, 0.9]}]
    facts = {"recall": recall, "training": {"tokens": 1000}}
    predictor = make_predictor(dense=[2], mlp=mlp, **facts)
    predictor.save_pretrained(tmp_path)
    loaded = LeMoPredictor.from_pretrained(tmp_path)
    assert loaded.info == predictor.info and loaded.same_as(predictor)
    assert loaded.attention[2] is None and (loaded.mlp is None) != mlp
    assert loaded.attention[1].sizes == predictor.attention[1].sizes
    assert not loaded.training and not loaded.attention[0].training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    rows = torch.randn(2, 20, BASE.hidden_size)
    for head in predictor.heads:
        for ours, theirs in zip(predictor.heads[head], loaded.heads[head], strict=True):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours(rows), theirs(rows))
    assert not loaded.same_as(make_predictor(dense=[2], mlp=mlp, seed=1, **facts))
    assert not loaded.same_as(make_predictor(dense=[2], mlp=not mlp, **facts))
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_loading_leaves_the_random_numbers_alone(saved):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    LeMoPredictor.from_pretrained(saved)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_fp32(saved, dtype):
    expected = {name: t.to(dtype).float() for name, t in load_file(saved / WEIGHTS).items()}
    change_tensors(saved, lambda t: t.update({name: x.to(dtype) for name, x in t.items()}))
    state = LeMoPredictor.from_pretrained(saved).state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_the_config_beside_a_predictor_is_ready_to_train(tmp_path):
    recommended = LeMoConfig(retention=0.3, block_size=8, dense_first_layers=1)
    make_predictor(dense=[0]).save_pretrained(tmp_path, recommended)
    config = LeMoConfig.from_pretrained(tmp_path)
    assert config == LeMoConfig(
        retention=0.3, block_size=8, dense_first_layers=1, predictor=str(tmp_path)
    )
    model = make_model("llama")
    lemo = apply_lemo(model, config)
    assert lemo.predictor.same_as(LeMoPredictor.from_pretrained(tmp_path))
    assert model(**batch()).loss.isfinite()
    with pytest.raises(ValueError, match="trained with block_size=8, the LeMoConfig has .*=64"):
        make_predictor().save_pretrained(tmp_path, LeMoConfig())


def test_the_config_field():
    assert LeMoConfig().policy == "recent" and LeMoConfig(predictor="a/b").policy == "predictor"
    assert LeMoConfig(threshold=1.0).policy == LeMoConfig(mlp_threshold=1.0).policy == "pooled"
    assert LeMoConfig(predictor=Path("a") / "b").predictor == "a/b"
    with pytest.raises(ValueError, match="predictor='a/b' and policy='oracle' cannot both"):
        LeMoConfig(predictor="a/b", policy="oracle")
    with pytest.raises(ValueError, match="predictor_revision='v1' without a predictor"):
        LeMoConfig(predictor_revision="v1")
    with pytest.raises(ValueError, match="predictor must be a string or None, got 3"):
        LeMoConfig(predictor=3)
    config = LeMoConfig(predictor="a/b", predictor_revision="v1")
    assert LeMoConfig.from_dict(config.to_dict()) == config


def test_a_crash_while_saving_leaves_the_old_predictor(saved, monkeypatch):
    before = LeMoPredictor.from_pretrained(saved)
    files = {path.name: path.read_bytes() for path in saved.iterdir()}

    def crash(*_):
        raise KeyboardInterrupt

    for name in ("_sha256", "write_json"):  # weights are written by then; the config is under way
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(predictor_files, name, crash)
            make_predictor(seed=3).save_pretrained(saved)
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == files
    with pytest.raises(TypeError, match="not JSON serializable"):
        make_predictor(seed=3, training={"tokens": torch.tensor(1)}).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files
    assert LeMoPredictor.from_pretrained(saved).same_as(before)


def test_files_of_two_saves_are_not_mixed(saved, tmp_path):
    make_predictor(dense=[0], seed=3).save_pretrained(tmp_path / "other")
    (saved / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    refused(saved, f"{WEIGHTS} has sha256 .* but {CONFIG} beside it names", "from another save")


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (lambda data: data[: len(data) // 2], ["no whole safetensors file", "Download it again"]),
        (lambda data: data[:40], ["no whole safetensors file"]),
        (lambda data: b"", ["no whole safetensors file"]),
        (lambda data: data + b"\0", ["no whole safetensors file"]),
        (lambda data: b"\xff" * 8 + data, ["no whole safetensors file"]),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), ["sha256 .* it is damaged"]),
        (
            lambda data: pickle.dumps({"a": 1}),
            ["is a pickle, which is never loaded", "save_pretrained"],
        ),
        (lambda data: b"version https://git-lfs.github.com/spec/v1\noid", ["git lfs pull"]),
    ],
    ids=["half", "header", "empty", "longer", "length", "bit", "pickle", "lfs"],
)
def test_damaged_weights(saved, damage, texts):
    path = saved / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    refused(saved, re.escape(str(path)), *texts)


class _Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle was run')",)


def test_a_pickle_is_never_run(saved):
    torch.save({"attention.1.weight": _Bomb()}, saved / WEIGHTS)
    refused(saved, "is a pickle of torch.save, which is never loaded")
    (saved / WEIGHTS).rename(saved / "lemo_predictors.bin")
    refused(saved, f"has no {WEIGHTS}", "pickled files .* are never loaded")


def _first(tensors):
    return min(tensors)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda t: t.pop(_first(t)), [r"lacks 1 tensors, such as 'attention\.1"]),
        (lambda t: t.update(extra=torch.ones(2)), ["has unexpected 1 tensors, such as 'extra'"]),
        (
            lambda t: t.update({_first(t): torch.ones(7, 3)}),
            [r"has shape \(7, 3\), but by the sizes in lemo_config.json beside it \("],
        ),
        (
            lambda t: t.update({_first(t): t[_first(t)].double()}),
            ["dtype F64, expected one of .*'F32', 'F16', 'BF16'"],
        ),
        (lambda t: t.update({_first(t): t[_first(t)].long()}), ["has dtype I64"]),
        (
            lambda t: t[_first(t)].view(-1)[:2].copy_(torch.tensor([torch.nan, -torch.inf])),
            ["2 of .* values of 'attention.1.* are NaN or infinite", "lower learning rate"],
        ),
    ],
    ids=["missing", "unexpected", "shape", "double", "integer", "nan"],
)
def test_tensors_that_do_not_belong(saved, change, texts):
    change_tensors(saved, change)
    refused(saved, re.escape(str(saved / WEIGHTS)), *texts)


def _section(**values):
    return lambda config: config["predictor"].update(values)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (lambda c: c.pop("predictor"), ["no object under the key 'predictor'", "LeMoConfig alone"]),
        (lambda c: c.update(predictor="org/name"), ["it refers to 'org/name': load"]),
        (_section(format=2), ["format 2, written by lemo_hf .*; this version reads up to 1"]),
        (_section(format=None), ["format None"]),
        (lambda c: c["predictor"].pop("base"), ["no 'base'", "pip install -U lemo-hf"]),
        (lambda c: c["predictor"].pop("sha256"), ["no 'sha256'"]),
        (_section(colour="red"), ["'colour'"]),
        (_section(block_size=0), ["block_size must be an integer of at least 1, got 0"]),
        (_section(normalize_scores="no"), ["normalize_scores must be a bool, got 'no'"]),
        (lambda c: c["predictor"]["attention"].pop(), ["an entry a layer .*has 4.* got 3"]),
        (_section(attention=[None] * 4), ["None for those that stay dense but not for all"]),
        (
            lambda c: c["predictor"]["attention"][2].update(wings=2),
            ["attention of layer 2 has sizes", "'wings'"],
        ),
        (lambda c: c["predictor"]["attention"].__setitem__(1, 7), ["layer 1 has sizes 7"]),
        (
            lambda c: c["predictor"]["attention"][1].update(block_size=16),
            ["attention predictor of layer 1 has block_size=16, expected 8"],
        ),
        (lambda c: c["predictor"]["attention"][1].update(units="9"), ["layer 1 has sizes"]),
        (lambda c: c["predictor"]["attention"][1].update(units=-1), ["layer 1 has sizes"]),
        (lambda c: c["predictor"]["attention"][1].update(units=10**30), ["layer 1 has sizes"]),
        # 128 TiB if it were allocated; the file's header says otherwise.
        (
            lambda c: c["predictor"]["attention"][1].update(units=10**12),
            [re.escape(WEIGHTS), r"has shape .*, but by the sizes in lemo_config.json"],
        ),
    ],
)
def test_configs_that_do_not_fit(saved, change, texts):
    change_config(saved, change)
    refused(saved, re.escape(str(saved)), *texts)


@pytest.mark.parametrize("text", ["{", "", "[1]", "\x00"])
def test_broken_json(saved, text):
    (saved / CONFIG).write_text(text)
    refused(saved, re.escape(str(saved / CONFIG)), "no valid JSON|must hold a JSON object")
    with pytest.raises(ValueError, match=CONFIG):
        LeMoConfig.from_pretrained(saved)


def test_the_base_model_is_compared(caplog):
    predictor = make_predictor()
    predictor.check(make_model("llama").config, LEARNED)
    assert not caplog.records
    for options, text in (
        ({"hidden_size": 64}, r"hidden_size=32 \(the model has 64\)"),
        ({"num_hidden_layers": 6}, r"num_hidden_layers=4 \(the model has 6\)"),
        ({"num_attention_heads": 2}, r"num_attention_heads=4 \(the model has 2\)"),
        ({"num_key_value_heads": 4}, r"num_key_value_heads=2 \(the model has 4\)"),
    ):
        config = make_model("llama", **options).config
        with pytest.raises(ValueError, match=f"another architecture: {text}.*policy='pooled'"):
            predictor.check(config, LEARNED)
    with pytest.raises(ValueError, match=r"model_type='llama' \(the model has 'mistral'\)"):
        predictor.check(make_model("mistral").config, LEARNED)
    for options in ({"block_size": 16}, {"normalize_scores": True}):
        (name, value), *_ = options.items()
        with pytest.raises(ValueError, match=rf"trained with {name}=.* has {name}={value}: set"):
            predictor.check(
                make_model("llama").config,
                LeMoConfig(**{"policy": "predictor", "block_size": 8, **options}),
            )
    assert not caplog.records


def test_another_name_commit_or_vocabulary_is_a_warning(caplog):
    config = make_model("llama").config
    config._name_or_path, config._commit_hash = "org/base", "a" * 40
    predictor = make_predictor(base=BaseModel.from_config(config))
    predictor.check(config, LEARNED)
    assert not caplog.records
    config._name_or_path, config._commit_hash, config.vocab_size = "org/tuned", "b" * 40, 99
    predictor.check(config, LEARNED)
    assert "name='org/base' (the model has 'org/tuned')" in caplog.text
    assert f"commit='{'a' * 40}'" in caplog.text and "vocab_size=97" in caplog.text
    opt = BaseModel.from_config(AutoConfig.for_model("opt"))
    assert opt.num_key_value_heads == opt.num_attention_heads and opt.name is None


def test_each_sublayer_asks_its_own_predictor(monkeypatch):
    predictor, asked = make_predictor(mlp=True), []

    def policy(inputs):
        asked.append((inputs.sublayer, inputs.layer_index, inputs.predictor))
        return torch.zeros(2, 9)

    monkeypatch.setitem(POLICIES, "predictor", policy)
    config = LeMoConfig(
        policy="predictor", mlp_retention=0.3, block_size=8, agree_across_layers=False
    )
    model = make_model("llama")
    apply_lemo(model, config, predictor)
    model(**batch())
    places = [(name, layer) for layer in range(4) for name in ("attention", "mlp")]
    assert asked == [(name, layer, predictor.heads[name][layer]) for name, layer in places]


def test_predictors_are_no_part_of_the_model():
    model = with_lora(make_model("llama"))
    names = set(model.state_dict()), [name for name, _ in model.named_parameters()]
    apply_lemo(model, LEARNED, make_predictor())
    assert (set(model.state_dict()), [name for name, _ in model.named_parameters()]) == names


def test_layers_without_a_predictor_must_be_dense():
    def apply(predictor, **options):
        config = LeMoConfig(policy="predictor", block_size=8, **options)
        return apply_lemo(make_model("llama"), config, predictor)

    own = {"agree_across_layers": False}
    with pytest.raises(ValueError, match="layer 0 has no attention.*set dense_first_layers=2"):
        apply(make_predictor(dense=[0, 1]))
    apply(make_predictor(dense=[0, 1]), dense_first_layers=2)
    apply(make_predictor(dense=[2]))  # the first sparse layer chooses for all
    with pytest.raises(ValueError, match="layer 3 has no attention.*set dense_last_layers=1"):
        apply(make_predictor(dense=[3]), **own)
    with pytest.raises(ValueError, match="layer 2 has no attention.* list, with 1 for layer 2"):
        apply(make_predictor(dense=[2]), **own)
    apply(make_predictor(dense=[2]), retention=[0.5, 0.5, 1, 0.5], **own)
    apply(make_predictor(dense=[2]), threshold=[1, 1, 0, 1], **own)
    for options in ({"mlp_retention": 0.5}, {"mlp_threshold": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.* have no MLP head: set"):
            apply(make_predictor(), **options)
        apply(make_predictor(mlp=True), **options)
    with pytest.raises(ValueError, match="layer 0 has no mlp predictor"):
        predictor = make_predictor(mlp=True)
        predictor.mlp[0] = None
        apply(predictor, mlp_retention=0.5)


def test_the_registry(saved, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "registry.json"
    path.write_text(json.dumps({"Org/Base": "./saved", "org/other": "me/predictors"}))
    monkeypatch.setattr(registry, "REGISTRY", path)
    assert registry.find_predictor("org/BASE") == str(tmp_path / "saved")
    assert "predictors registered for 'org/BASE'" in caplog.text
    assert registry.find_predictor("org/other") == "me/predictors"
    assert registry.find_predictor("nobody/knows") is None and registry.find_predictor("") is None
    assert "no predictors are registered for 'nobody/knows'" in caplog.text
    model = make_model("llama")
    auto = LeMoConfig(predictor="auto", block_size=8, dense_first_layers=1)
    model.config._name_or_path = "org/unknown"
    with pytest.raises(ValueError, match="base model 'org/unknown'.*train-predictor.*'pooled'"):
        apply_lemo(model, auto)
    model.config._name_or_path = "org/base"
    lemo = apply_lemo(model, auto)
    assert lemo.predictor.same_as(LeMoPredictor.from_pretrained(saved))
    assert "3 of 4 layers have a predictor, attention only" in lemo.describe()


def test_the_shipped_registry():
    """Every entry is a name and what is loaded for it, and every data file is in the wheel."""
    entries = json.loads(registry.REGISTRY.read_text())
    assert len({name.lower() for name in entries}) == len(entries)
    assert all(found.count("/") == 1 for found in entries.values())
    files = [path for path in (ROOT / "predictors").iterdir() if path.is_file()]
    assert [path.name for path in files if path.suffix != ".py"] == ["registry.json"]
    assert '"lemo_hf.predictors" = ["registry.json"]' in (ROOT / "pyproject.toml").read_text()


def predicting(directory, **options):
    return LeMoConfig(predictor=str(directory), block_size=8, dense_first_layers=1, **options)


def test_training_saves_the_predictor_with_the_model(saved, tmp_path, capsys):
    expected = LeMoPredictor.from_pretrained(saved)
    out = tmp_path / "out"
    trainer = make_trainer(out, predicting(saved), save_strategy="steps", save_steps=2)
    trainer.train()
    assert "by 'predictor' (3 of 4 layers have a predictor" in capsys.readouterr().out
    trainer.save_model()
    for directory in (out, out / "checkpoint-2", out / "checkpoint-4"):
        assert LeMoPredictor.from_pretrained(directory).same_as(expected)
        assert LeMoConfig.from_pretrained(directory) == predicting(directory)


def test_a_resumed_run_chooses_as_before(saved, tmp_path, caplog):
    """The checkpoint has all that is needed, even if what was given is gone; the same losses."""
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", predicting(saved), **arguments)
    expected = losses(whole)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    same = make_trainer(tmp_path / "same", predicting(saved), **arguments)
    assert losses(same, resume_from_checkpoint=checkpoint) == expected
    assert "another predictor" not in caplog.text and "another LeMoConfig" not in caplog.text

    make_predictor(dense=[0], seed=9).save_pretrained(tmp_path / "other")
    other = make_trainer(tmp_path / "o", predicting(tmp_path / "other"), **arguments)
    assert losses(other) != expected
    assert losses(other, resume_from_checkpoint=checkpoint) == expected
    assert "was trained with another predictor than" in caplog.text
    assert "another LeMoConfig" not in caplog.text
    caplog.clear()

    gone = make_trainer(tmp_path / "g", predicting("nobody/nowhere"), **arguments)
    assert "needed by train() unless it resumes" in caplog.text and gone.lemo is None
    assert losses(gone, resume_from_checkpoint=checkpoint) == expected
    for name, value in adapter(gone).items():
        assert torch.equal(value, adapter(whole)[name])
    lost = make_trainer(tmp_path / "l", predicting("nobody/nowhere"), **arguments)
    with pytest.raises(OSError, match="'nobody/nowhere' is not in the Hub's cache.*OFFLINE"):
        lost.train()


def test_model_init_keeps_the_predictor(saved, tmp_path):
    trainer = make_trainer(tmp_path, predicting(saved), model_init=lambda: make_model("llama"))
    direct = make_trainer(tmp_path, predicting(saved), model=make_model("llama"))
    assert losses(trainer) == losses(direct)
