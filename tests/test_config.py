"""`LeMoConfig`: every value checked, JSON round trip."""

import dataclasses
import json

import numpy as np
import pytest
from support.paths import ROOT

from lemo_hf import LeMoConfig, LeMoPredictor, __version__
from lemo_hf.config import KeepRule


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("retention", 0, r"retention must lie in \(0, 1\], got 0 "),
        ("retention", 1.01, "got 1.01"),
        ("retention", float("nan"), "got nan"),
        ("retention", "half", "got 'half'"),
        ("retention", (0.5, -1), r"got -1 in retention=\(0.5, -1\)"),
        ("threshold", -0.1, r"threshold must lie in \[0, inf\), got -0.1 "),
        ("threshold", (1, float("inf")), "got inf in threshold="),
        ("mlp_threshold", True, "mlp_threshold .* got True"),
        ("mlp_retention", 2, "mlp_retention .* got 2"),
        ("block_size", 0, "block_size must be an integer of at least 1, got 0"),
        ("block_size", 64.0, "got 64.0"),
        ("segment_size", -5, "got -5"),
        ("dense_first_layers", -1, "got -1"),
        ("dense_last_layers", True, "got True"),
        ("policy", "best", r"policy must be one of \('auto'.*got 'best'"),
        ("chunk_size", 0, "chunk_size must be an integer of at least 1, got 0"),
        ("random_share", 1, r"random_share must lie in \[0, 1\), or be None, got 1"),
        ("dense_finish", 1.5, r"dense_finish must lie in \[0, 1\], or be None, got 1.5"),
        ("dense_finish", "last", "got 'last'"),
        ("finish_retention", 0, r"finish_retention must lie in \(0, 1\], got 0"),
        ("supervise", "some", "supervise must be one of .* got 'some'"),
        ("agree_across_layers", 1, "agree_across_layers must be one of .* got 1"),
        ("recompute", "yes", "got 'yes'"),
        ("seed", 0.5, "got 0.5"),
    ],
)
def test_bad_values_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        LeMoConfig(**{field: value})


def test_round_trip(tmp_path):
    config = LeMoConfig(retention=[1, 0.5, 0.25], mlp_retention=0.7, agree_across_layers=False)
    config.save_pretrained(tmp_path / "new" / "folder")
    assert LeMoConfig.from_pretrained(tmp_path / "new" / "folder") == config
    stored = json.loads((tmp_path / "new" / "folder" / "lemo_config.json").read_text())
    assert stored["lemo_version"] == __version__ and stored["retention"] == [1, 0.5, 0.25]


def test_it_is_frozen_and_hashable():
    config = LeMoConfig(retention=[0.5, 1])
    assert hash(config) == hash(LeMoConfig(retention=(0.5, 1)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.retention = 0.3


def test_unknown_keys_are_named():
    with pytest.raises(ValueError, match="unknown keys in a LeMoConfig: blocksize, sparsity"):
        LeMoConfig.from_dict({"sparsity": 0.5, "blocksize": 64, "seed": 1})


def test_from_pretrained_reads_the_hub(tmp_path, monkeypatch):
    LeMoConfig(block_size=32).save_pretrained(tmp_path)
    calls = []

    def download(repo, name, **kwargs):
        calls.append((repo, name, kwargs))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert LeMoConfig.from_pretrained("org/name", revision="v1").block_size == 32
    assert calls == [("org/name", "lemo_config.json", {"revision": "v1"})]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retention": (0.5, 0.5)}, "retention has 2 entries, the model has 4 layers"),
        ({"mlp_retention": (0.5,) * 5}, "mlp_retention has 5 entries, the model has 4"),
        ({"dense_first_layers": 3, "dense_last_layers": 1}, "leave no sparse layer"),
        (
            {"retention": (0.5, 1, 1, 1), "dense_first_layers": 1},
            "retention of layer 0 is 0.5, but the layer is dense",
        ),
        ({"retention": (0.5, 0.4, 0.5, 0.5)}, "differs between layers.*agree_across_layers=False"),
        ({"threshold": (1.0, 1.0)}, "threshold has 2 entries, the model has 4 layers"),
        ({"threshold": (1, 1, 1, 1), "dense_last_layers": 1}, "threshold of layer 3 is 1.*to 0"),
        ({"mlp_threshold": (1, 2, 1, 1)}, "mlp_threshold=.* differs between layers"),
    ],
)
def test_retentions_must_fit_the_model(options, message):
    with pytest.raises(ValueError, match=message):
        LeMoConfig(**options).layer_rules(4)


def test_share_or_threshold():
    assert LeMoConfig().retention == 0.3 and LeMoConfig(threshold=1.0).retention is None
    with pytest.raises(ValueError, match=r"retention=0.5 and threshold=1 both .* one of them to N"):
        LeMoConfig(retention=0.5, threshold=1)
    with pytest.raises(ValueError, match="mlp_retention=0.5 and mlp_threshold=0 both"):
        LeMoConfig(mlp_retention=0.5, mlp_threshold=0)
    config = LeMoConfig(threshold=[0, 1.5], agree_across_layers=False, dense_first_layers=1)
    assert LeMoConfig.from_dict(config.to_dict()) == config
    assert config.layer_rules(2) == [None, (KeepRule(threshold=1.5), None)]
    assert LeMoConfig(mlp_threshold=2.0).layer_rules(1) == [(KeepRule(0.3), KeepRule(None, 2.0))]


def test_the_best_known_is_the_default():
    assert LeMoConfig().policy == "auto" and LeMoConfig().finish == 0.1
    assert LeMoConfig().chance == 0.25 and LeMoConfig(policy="overlap").chance == 0
    assert LeMoConfig(threshold=1.0).policy == "pooled"
    assert LeMoConfig(predictor="me/it").policy == "predictor"
    assert LeMoConfig(policy="chunks").finish == 0 and LeMoConfig(policy="overlap").finish == 0
    assert LeMoConfig(dense_finish=0).finish == 0
    assert LeMoConfig(policy="recent", dense_finish=0.2).finish == 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "auto", "threshold": 1.0}, "threshold=1.0 compares scores, and policy='auto'"),
        (
            {"policy": "overlap", "mlp_threshold": 1.0, "random_share": 0.2},
            "mlp_threshold=1.0 compares scores, and policy='overlap' with random_share=0.2",
        ),
        ({"policy": "recent", "random_share": 0.2}, "only 'overlap', 'predictor' and 'auto'"),
        ({"offload_gib": 4, "recompute": ("mlp", "none")}, "offload_gib=4 and recompute="),
        ({"seed": 2**70}, "seed must be an integer of at most 9,223,372"),
    ],
)
def test_what_does_not_go_together_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        LeMoConfig(**options)


def test_numpys_numbers_are_numbers():
    config = LeMoConfig(retention=np.float32(0.25), block_size=np.int64(32), seed=np.int32(3))
    assert config == LeMoConfig(retention=0.25, block_size=32, seed=3)
    assert {type(config.retention), type(config.block_size)} == {float, int}


def test_layer_rules():
    config = LeMoConfig(retention=0.4, mlp_retention=(1, 0.5, 0.5, 1), dense_first_layers=1)
    with pytest.raises(ValueError, match="differs between layers"):
        config.layer_rules(4)
    own = dataclasses.replace(config, agree_across_layers=False)
    shares = [None, (0.4, 0.5), (0.4, 0.5), (0.4, 1)]
    assert own.layer_rules(4) == [pair and tuple(map(KeepRule, pair)) for pair in shares]
    assert LeMoConfig(retention=0.4).layer_rules(2) == [(KeepRule(0.4), None)] * 2


@pytest.mark.parametrize("place", ["demo/predictor", "smollm2"])
def test_the_shipped_predictors_are_of_today(place):
    directory = ROOT / "examples" / place
    config = LeMoConfig.from_pretrained(directory)
    assert config.policy == "predictor" and config.predictor == str(directory)
    assert LeMoPredictor.from_pretrained(directory).known[0] == config.dense_first_layers


@pytest.mark.parametrize("kept", [0.5, (0.5, 0.7)])
def test_a_finish_keeps_no_less_than_the_steps_before_it(kept):
    fields = {"retention": kept, "agree_across_layers": False, "finish_retention": 0.4}
    said = r"finish_retention=0.4 keeps less than retention=.*0.5.* of the steps before the finish"
    for finish in ({}, {"dense_finish": 0.2}, {"dense_finish": 0.2, "policy": "recent"}):
        with pytest.raises(ValueError, match=said):
            LeMoConfig(**fields, **finish)
        LeMoConfig(**{**fields, "finish_retention": 0.5}, **finish)
    for without in ({"dense_finish": 0}, {"policy": "recent"}):  # no finish: a run says so
        LeMoConfig(**fields, **without)
    LeMoConfig(threshold=1.0, dense_finish=0.2, finish_retention=0.1)
