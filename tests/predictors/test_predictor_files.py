"""Predictors in files: what is saved is what is loaded, and nothing that is wrong is loaded."""

import copy
import json
import pickle
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from crash.children import Child
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.hub_client import BASE, make_predictor
from support.models import batch, make_model, with_lora
from support.trainers import adapter, losses, make_trainer
from transformers import AutoConfig

from lemo_hf import LeMoConfig, LeMoPredictor, apply_lemo, load_predictor
from lemo_hf.core.policies import POLICIES
from lemo_hf.predictors import predictor_files
from lemo_hf.predictors.base_model import BaseModel, fingerprint_of
from lemo_hf.storage.files import CONFIG_NAME as CONFIG
from lemo_hf.storage.files import WEIGHTS_NAME as WEIGHTS

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


def test_what_is_loaded_is_what_was_saved(tmp_path):
    row = {"documents": "books", "layer": 1, "retention": 0.3, "policy": "predictor"}
    facts = {"recall": [{**row, "recall": 0.9}], "training": {"tokens": 1000}}
    predictor = make_predictor(dense=[2], **facts)
    predictor.save_pretrained(tmp_path)
    loaded = LeMoPredictor.from_pretrained(tmp_path)
    assert loaded.info == predictor.info and loaded.same_as(predictor)
    assert loaded.layers[2] is None and loaded.known == [0, 1, 3]
    assert loaded.layers[1].sizes == predictor.layers[1].sizes
    assert not loaded.training and not loaded.layers[0].training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    rows = torch.randn(2, 20, BASE.hidden_size)
    asking = torch.tensor([[2, 1]] * 2), torch.ones(2, 2, dtype=torch.bool)
    for ours, theirs in zip(predictor.layers, loaded.layers, strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours(rows, *asking), theirs(rows, *asking))
    assert not loaded.same_as(make_predictor(dense=[2], seed=1, **facts))
    assert not loaded.same_as(make_predictor(dense=[1], **facts))
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
    assert LeMoConfig().policy == "auto" and LeMoConfig(predictor="a/b").policy == "predictor"
    assert LeMoConfig(threshold=1.0).policy == LeMoConfig(mlp_threshold=1.0).policy == "pooled"
    assert LeMoConfig(predictor=Path("a") / "b").predictor == "a/b"
    with pytest.raises(ValueError, match="predictor='a/b' and policy='oracle' cannot both"):
        LeMoConfig(predictor="a/b", policy="oracle")
    with pytest.raises(ValueError, match="predictor_revision='v1' needs a predictor"):
        LeMoConfig(predictor_revision="v1")
    with pytest.raises(ValueError, match="predictor must be a string or None, got 3"):
        LeMoConfig(predictor=3)
    config = LeMoConfig(predictor="a/b", predictor_revision="v1")
    assert LeMoConfig.from_dict(config.to_dict()) == config


def test_a_failed_save_leaves_the_old_predictor(saved):
    before = LeMoPredictor.from_pretrained(saved)
    files = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(TypeError, match="not JSON serializable"):
        make_predictor(seed=3, training={"tokens": torch.tensor(1)}).save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == files
    assert LeMoPredictor.from_pretrained(saved).same_as(before)


@pytest.mark.parametrize("there", [True, False])
def test_a_save_killed_at_any_file_operation_leaves_the_old_predictor_or_the_new(tmp_path, there):
    """The new one from one rename on, that of the config; the next save ends what was begun."""
    old, new, next_one = (make_predictor(seed=seed) for seed in (1, 2, 3))
    found, folder, killed = [], tmp_path / "saved", True
    while killed:
        shutil.rmtree(folder, ignore_errors=True)
        if there:
            old.save_files(folder)
        at = len(found) + 1
        child = Child(partial(new.save_files, folder), tmp_path / "log", tmp_path, kill_at=at)
        killed = child.wait().killed
        if not there and not (folder / CONFIG).exists():
            found.append("none")
        else:
            now = LeMoPredictor.from_pretrained(folder)
            found.append("old" if now.same_as(old) else "new" if now.same_as(new) else "neither")
        next_one.save_files(folder)
        assert LeMoPredictor.from_pretrained(folder).same_as(next_one)
        digest = predictor_files._sha256(folder / WEIGHTS)
        assert json.loads((folder / CONFIG).read_text())["predictor"]["sha256"] == digest
    before = "old" if there else "none"
    assert len(found) > 4 and set(found) == {before, "new"}
    assert found == sorted(found, key=lambda name: name == "new")


def test_two_writers_and_a_reader(tmp_path):
    """Who reads at any time finds one of both whole; at the end there is nothing else."""
    folder, one, two = tmp_path / "saved", make_predictor(seed=1), make_predictor(seed=2)
    one.save_files(folder)

    def save(predictor):
        for _ in range(60):
            predictor.save_files(folder)

    writers = [Child(partial(save, p), tmp_path / f"log{i}") for i, p in enumerate((one, two))]
    while any(writer.runs() for writer in writers):
        now = LeMoPredictor.from_pretrained(folder)
        assert now.same_as(one) or now.same_as(two)
    for writer in writers:
        ended = writer.wait()
        assert ended.code == 0, ended.output
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_files_of_two_saves_are_not_mixed(saved, tmp_path):
    make_predictor(dense=[0], seed=3).save_pretrained(tmp_path / "other")
    (saved / WEIGHTS).write_bytes((tmp_path / "other" / WEIGHTS).read_bytes())
    refused(saved, f"{WEIGHTS} has sha256 .* but {CONFIG} beside it names", "from another save")


@pytest.mark.parametrize(
    ("damage", "texts"),
    [
        (
            lambda data: data[: len(data) // 2],
            ["not a complete safetensors file", "Download it again"],
        ),
        (lambda data: data[:40], ["not a complete safetensors file"]),
        (lambda data: b"", ["not a complete safetensors file"]),
        (lambda data: data + b"\0", ["not a complete safetensors file"]),
        (lambda data: b"\xff" * 8 + data, ["not a complete safetensors file"]),
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
        (lambda t: t.pop(_first(t)), [r"lacks 1 tensors, such as 'networks\.1"]),
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
            ["2 of .* values of 'networks.1.* are NaN or infinite", "lower learning rate"],
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
        (lambda c: c.update(predictor="org/name"), ["but refers to 'org/name': load"]),
        (_section(format=3), ["format 3, written by .*; this version reads 2: pip install -U"]),
        (_section(format=1), ["format 1, .*: train it again"]),
        (_section(format=None), ["format None"]),
        (lambda c: c["predictor"].pop("base"), ["no 'base'", "pip install -U lemo-hf"]),
        (lambda c: c["predictor"].pop("sha256"), ["no 'sha256'"]),
        (_section(colour="red"), ["'colour'"]),
        (_section(block_size=0), ["block_size must be an integer of at least 1, got 0"]),
        (
            lambda c: c["predictor"]["layers"].pop(),
            ["one entry for each of the base model's 4 layers.* got 3"],
        ),
        (_section(layers=[None] * 4), ["not only None"]),
        (
            lambda c: c["predictor"]["layers"][2].update(wings=2),
            ["layer 2 has sizes", "'wings'"],
        ),
        (lambda c: c["predictor"]["layers"].__setitem__(1, 7), ["layer 1 has sizes 7"]),
        (
            lambda c: c["predictor"]["layers"][1].update(block_size=16),
            ["predictor of layer 1 has block_size=16, expected 8"],
        ),
        (lambda c: c["predictor"]["layers"][1].update(rank="9"), ["layer 1 has sizes"]),
        (lambda c: c["predictor"]["layers"][1].update(rank=-1), ["layer 1 has sizes"]),
        (lambda c: c["predictor"]["layers"][1].update(rank=10**30), ["layer 1 has sizes"]),
        # 128 TiB if it were allocated; the file's header says otherwise.
        (
            lambda c: c["predictor"]["layers"][1].update(rank=10**12),
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
    refused(saved, re.escape(str(saved / CONFIG)), "not valid JSON|must hold a JSON object")
    with pytest.raises(ValueError, match=CONFIG):
        LeMoConfig.from_pretrained(saved)


def test_the_base_model_is_compared(caplog):
    predictor = make_predictor()
    predictor.check(make_model("llama"), LEARNED)
    assert not caplog.records
    for options, text in (
        ({"hidden_size": 64}, r"hidden_size=32 \(the model has 64\)"),
        ({"num_hidden_layers": 6}, r"num_hidden_layers=4 \(the model has 6\)"),
        ({"num_attention_heads": 2}, r"num_attention_heads=4 \(the model has 2\)"),
        ({"num_key_value_heads": 4}, r"num_key_value_heads=2 \(the model has 4\)"),
    ):
        with pytest.raises(ValueError, match=f"another architecture: {text}.*policy='overlap'"):
            predictor.check(make_model("llama", **options), LEARNED)
    with pytest.raises(ValueError, match=r"model_type='llama' \(the model has 'mistral'\)"):
        predictor.check(make_model("mistral"), LEARNED)
    with pytest.raises(ValueError, match="trained with block_size=8.* has block_size=16: set"):
        predictor.check(make_model("llama"), LeMoConfig(policy="predictor", block_size=16))
    assert not caplog.records


def test_other_weights_are_a_warning_whatever_their_name(caplog):
    model = make_model("llama")
    base = BaseModel.of_model(model)
    predictor = make_predictor(base=base)
    model.config._name_or_path = "org/copy"
    predictor.check(model, LEARNED)
    assert not caplog.records
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] += 0.1
    predictor.check(model, LEARNED)
    assert f"fingerprint='{base.fingerprint}' (the model has" in caplog.text


def test_fingerprints_survive_casts_and_adapters_and_tell_models_apart():
    model = make_model("llama").bfloat16()  # as checkpoints are
    known = fingerprint_of(model)
    assert re.fullmatch("[0-9a-f]{64}", known)
    assert fingerprint_of(model.half()) == fingerprint_of(model.float()) == known
    tuned = with_lora(copy.deepcopy(model)).get_base_model()
    assert fingerprint_of(tuned) == known
    tuned.get_input_embeddings().weight.data[7, 3] += 0.01
    assert fingerprint_of(tuned) != known
    assert fingerprint_of(model.to("meta")) is None


def test_where_weights_are_not_known_another_name_commit_or_vocabulary_is_a_warning(caplog):
    config = make_model("llama").config
    config._name_or_path, config._commit_hash = "org/base", "a" * 40
    base = BaseModel.from_config(config)
    base.check(BaseModel.from_config(config))
    assert not caplog.records
    config._name_or_path, config._commit_hash, config.vocab_size = "org/tuned", "b" * 40, 99
    base.check(BaseModel.from_config(config))
    assert "name='org/base' (the model has 'org/tuned')" in caplog.text
    assert f"commit='{'a' * 40}'" in caplog.text and "vocab_size=97" in caplog.text
    opt = BaseModel.from_config(AutoConfig.for_model("opt"))
    assert opt.num_key_value_heads == opt.num_attention_heads and opt.name is None


def test_each_layer_asks_its_own_predictor(monkeypatch):
    predictor, asked = make_predictor(), []

    def policy(inputs):
        asked.append((inputs.layer_index, inputs.predictor))
        return torch.zeros(2, 9)

    monkeypatch.setitem(POLICIES, "predictor", policy)
    config = LeMoConfig(policy="predictor", block_size=8, agree_across_layers=False)
    model = make_model("llama")
    apply_lemo(model, config, predictor)
    model(**batch())
    assert asked == list(enumerate(predictor.layers))


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
    with pytest.raises(ValueError, match="layer 0 has no predictor.*set dense_first_layers=2"):
        apply(make_predictor(dense=[0, 1]))
    apply(make_predictor(dense=[0, 1]), dense_first_layers=2)
    apply(make_predictor(dense=[2]))  # the first sparse layer chooses for all
    with pytest.raises(ValueError, match="layer 3 has no predictor.*set dense_last_layers=1"):
        apply(make_predictor(dense=[3]), **own)
    with pytest.raises(ValueError, match="layer 2 has no predictor.* list, with 1 for layer 2"):
        apply(make_predictor(dense=[2]), **own)
    apply(make_predictor(dense=[2]), retention=[0.5, 0.5, 1, 0.5], **own)
    apply(make_predictor(dense=[2]), threshold=[1, 1, 0, 1], **own)
    for options in ({"mlp_retention": 0.5}, {"mlp_threshold": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}=.*choose for attention: set"):
            apply(make_predictor(), **options)


def test_auto_is_looked_up_for_the_model(saved, monkeypatch):
    asked = []

    def find(base, block_size):
        asked.append((base, block_size))
        return str(saved)

    monkeypatch.setattr(load_predictor, "find_predictor", find)
    model = make_model("llama")
    lemo = apply_lemo(model, LeMoConfig(predictor="auto", block_size=8, dense_first_layers=1))
    assert asked == [(BaseModel.of_model(model), 8)]
    assert lemo.predictor.same_as(LeMoPredictor.from_pretrained(saved))
    assert "predictors of layers 1, 2, 3 of 4" in lemo.describe()
    monkeypatch.undo()
    with pytest.raises(
        ValueError, match="a model from a directory or from scratch.*train-predictor"
    ):
        apply_lemo(make_model("llama"), LeMoConfig(predictor="auto", block_size=8))


def predicting(directory, **options):
    shared = {"block_size": 8, "dense_first_layers": 1, "retention": 0.5}
    return LeMoConfig(predictor=str(directory), **shared, **options)


def test_training_saves_the_predictor_with_the_model(saved, tmp_path, capsys):
    expected = LeMoPredictor.from_pretrained(saved)
    out = tmp_path / "out"
    trainer = make_trainer(out, predicting(saved), save_strategy="steps", save_steps=2)
    trainer.train()
    assert "predictors of layers 1, 2, 3 of 4" in capsys.readouterr().out
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
    assert "train() needs the predictor, unless it resumes" in caplog.text and gone.lemo is None
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
