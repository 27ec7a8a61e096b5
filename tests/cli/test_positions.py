"""Positions that a command was asked for are those of a model whose config was written by hand."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from support.grids import covering
from support.models import make_model
from support.paths import DEMO
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lemo_hf.cli.options import ModelOptions, prepared_config
from lemo_hf.cli.positions import ORIGINAL, READ
from lemo_hf.cli.train_config import ModelSection
from lemo_hf.cli.train_model import load_base
from lemo_hf.eval.perplexity import perplexity

MODEL = str(DEMO / "model")  # 512 positions, 16 frequencies a head
BOOK = DEMO / "text" / "heldout-oh-money-money.txt"
TEXT = BOOK.read_text()[20_000:24_000]
YARN = {"factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0] * 16, "long_factor": [1.0 + 0.2 * i for i in range(16)]}
# By type, what a user gives; what a config written by hand needs beside it.
GIVEN = {
    "linear": ({"factor": 4.0}, {}),
    "dynamic": ({"factor": 4.0}, {}),
    "yarn": ({"factor": 4.0}, {"original_max_position_embeddings": 512}),
    "longrope": (LONG, {"original_max_position_embeddings": 512}),
    "llama3": (LLAMA3, {"original_max_position_embeddings": 512}),
    "proportional": ({"partial_rotary_factor": 0.5, "factor": 2.0}, {}),
}


@pytest.fixture(scope="module")
def ids():
    found = AutoTokenizer.from_pretrained(MODEL)(TEXT, verbose=False)["input_ids"][:900]
    return torch.tensor([found])


def logits(config, ids):
    model = AutoModelForCausalLM.from_pretrained(MODEL, config=config, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(ids).logits


def by_hand(rope, most=512):
    config = AutoConfig.from_pretrained(MODEL)
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    config.max_position_embeddings = most
    return config


def asked(name=MODEL, **options):
    return prepared_config(name, **options)


def test_all_types_are_known():
    assert set(READ) == {"default", *ROPE_INIT_FUNCTIONS} == {"default", *GIVEN}


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("kind", "key", "most"), covering(list(GIVEN), ["rope_type", "type"], [None, 2048])
)
def test_every_type(kind, key, most, ids):
    given, needed = GIVEN[kind]
    config = asked(rope_parameters={key: kind, **given}, max_position_embeddings=most)
    reach = 2048 if kind in ("linear", "yarn", "llama3") else 512  # four times the original
    expected = by_hand({"rope_type": kind, **given, **needed}, most or reach)
    assert config.rope_parameters == expected.rope_parameters
    assert config.max_position_embeddings == expected.max_position_embeddings
    found = logits(config, ids)
    torch.testing.assert_close(found, logits(expected, ids), atol=0, rtol=0)
    if (kind, most) != ("dynamic", 2048):  # which begins behind 2,048
        assert (found - logits(by_hand({"rope_type": "default"}), ids)).abs().max() > 1


@pytest.mark.parametrize("kind", ["linear", "yarn", "dynamic"])
def test_stretched_to_a_length(kind, ids):
    """Each of them helps beyond the 512 tokens that were trained."""
    config = asked(rope_type=kind, length=2048)
    needed = GIVEN[kind][1]
    expected = by_hand(
        {"rope_type": kind, "factor": 4.0, **needed}, 512 if kind == "dynamic" else 2048
    )
    found = logits(config, ids)
    torch.testing.assert_close(found, logits(expected, ids), atol=0, rtol=0)
    section = ModelSection(MODEL, dtype="float32", rope_type=kind)
    model, _ = load_base(section, 2048)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, found, atol=0, rtol=0)

    def loss(of):
        return torch.nn.functional.cross_entropy(of[0, 600:-1], ids[0, 601:])

    assert loss(found) < loss(logits(by_hand({"rope_type": "default"}), ids))


@pytest.mark.parametrize("form", [{"type": "yarn", "factor": 4.0}, {"rope_type": "yarn", **YARN}])
def test_evaluation(form, lemo, tmp_path, ids):
    """From the command line, with the keys that models were published with."""
    (tmp_path / "book.txt").write_text(TEXT)
    code, out, err = lemo(
        *("eval", "perplexity", "--model", MODEL, "--dataset", tmp_path / "book.txt"),
        *("--max-length", 2048, "--max-position-embeddings", 2048, "--dtype", "float32"),
        *("--rope-parameters", json.dumps(form), "--json"),
    )
    assert code == 0, err
    expected = by_hand({"rope_type": "yarn", **YARN}, 2048)
    model = AutoModelForCausalLM.from_pretrained(MODEL, config=expected, dtype=torch.float32)
    document = AutoTokenizer.from_pretrained(MODEL)(TEXT, verbose=False)["input_ids"]
    found = perplexity(model, [document], max_length=2048, progress=False).perplexity
    assert json.loads(out)["perplexity"] == pytest.approx(found, rel=1e-6)


def saved(folder, kind="llama", **settings):
    make_model(kind, **settings).save_pretrained(folder)
    return str(folder)


def test_over_a_model_that_is_stretched(tmp_path):
    """Its own original length holds; what another type does not read goes."""
    own = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    own["original_max_position_embeddings"] = 128
    name = saved(tmp_path, rope_parameters=own)
    config = asked(name, rope_parameters={"factor": 8.0})
    assert config.rope_parameters == {**own, "factor": 8.0}
    config = asked(name, rope_parameters={"type": "yarn", "factor": 8.0})
    assert config.rope_parameters == {
        **{"rope_type": "yarn", "factor": 8.0, "rope_theta": 5e5},
        "original_max_position_embeddings": 128,
    }
    config = asked(name, rope_parameters={"rope_type": "default"})
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    with pytest.raises(ValueError, match="are stretched already"):
        asked(name, rope_type="yarn", length=4096)


def test_linear_scaling_hides_the_original_length(tmp_path):
    own = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    name = saved(tmp_path, rope_parameters=own)
    with pytest.raises(ValueError, match="needs original_max_position_embeddings too"):
        asked(name, rope_parameters={"rope_type": "yarn", "factor": 4.0})


def test_layers_with_positions_of_their_own(tmp_path):
    name = saved(tmp_path, "gemma3_text")
    own = AutoConfig.from_pretrained(name).rope_parameters
    given = {"full_attention": {"type": "linear", "factor": 8.0}}
    found = asked(name, rope_parameters=given).rope_parameters
    assert found["sliding_attention"] == own["sliding_attention"]
    assert found["full_attention"] == {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}
    for wrong in ({"rope_type": "linear", "factor": 8.0}, {"full": {"factor": 8.0}}):
        with pytest.raises(
            ValueError, match="has one set of parameters for each of full_attention, sliding_att"
        ):
            asked(name, rope_parameters=wrong)
    with pytest.raises(ValueError, match="no single set of rotary parameters"):
        asked(name, rope_type="linear", length=4096)


def test_phi(tmp_path):
    """It keeps its original length twice, and takes one type."""
    lists = {name: [1.5] * 4 for name in ("short_factor", "long_factor")}
    name = saved(tmp_path, "phi3", original_max_position_embeddings=512)
    given = {"type": "longrope", **lists}
    assert asked(name, rope_parameters=given).rope_parameters[ORIGINAL] == 512
    config = asked(name, rope_parameters={**given, ORIGINAL: 128})
    model = AutoModelForCausalLM.from_config(config)
    assert model.model.rotary_emb.config.rope_parameters[ORIGINAL] == 128
    for kind in ("yarn", "linear"):  # they would run, but what is saved would not load
        with pytest.raises(ValueError, match="'phi3' does not take these positions"):
            asked(name, rope_type=kind, length=2048)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rope_type": "ntk", "factor": 4.0}, "there is no rope_type 'ntk': it must be one of"),
        ({"rope_type": ["yarn"]}, "there is no rope_type ['yarn']"),
        ({"factor": 4.0}, "factor means nothing to rope_type 'default', which is the model's own"),
        ({"rope_type": "yarn"}, "rope_type 'yarn' needs factor too"),
        ({"rope_type": "llama3", "factor": 4.0}, "needs low_freq_factor, high_freq_factor too"),
        ({"rope_type": "yarn", "type": "linear"}, "contradict each other"),
        ({"rope_type": "linear", **YARN}, "original_max_position_embeddings means nothing to"),
        ({"rope_type": "dynamic", **YARN}, "begins after max_position_embeddings: give that"),
        ({"rope_type": "yarn", "factor": "4"}, "factor must be a number of at least 1, got '4'"),
        ({"rope_type": "linear", "factor": 0.5}, "factor must be a number of at least 1, got 0.5"),
        ({"rope_type": "linear", "factor": True}, "factor must be a number of at least 1"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number, got nan"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1}, "beta_fast must be more than"),
        ({"rope_type": "longrope", **LONG, "long_factor": [2.0]}, "a list of 16 positive numbers"),
        ({"rope_type": "yarn", "factor": 4.0, "slow": 1}, "slow means nothing to rope_type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, "a rope_type that reads it (proportional)"),
    ],
)
def test_mistakes(given, message, lemo):
    code, _, err = lemo(
        *("eval", "perplexity", "--model", MODEL, "--dataset", BOOK),
        *("--rope-parameters", json.dumps(given)),
    )
    assert code == 2 and message in err and "Traceback" not in err


def test_options_that_contradict(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    with pytest.raises(ValueError, match="contradict each other: give one"):
        asked(rope_type="linear", rope_parameters=yarn, length=2048)
    with pytest.raises(ValueError, match="leave out --max-position-embeddings"):
        asked(rope_type="dynamic", max_position_embeddings=2048, length=2048)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        asked(max_position_embeddings=0)
    config = asked(rope_type="yarn", rope_parameters={"beta_fast": 16}, length=2048)
    assert config.rope_parameters["beta_fast"] == 16 and config.rope_parameters["factor"] == 4
    name = saved(tmp_path, "opt")
    for options in ({"rope_parameters": yarn}, {"rope_type": "yarn", "length": 4096}):
        with pytest.raises(ValueError, match="'opt' has no rotary positions to change"):
            asked(name, **options)


def test_rows_longer_than_the_positions(tmp_path, caplog):
    """A table of positions ends; rotary positions go on, untrained."""
    length = 2**20
    with pytest.raises(ValueError, match="longer than the .* positions of the model .opt., and it"):
        asked(saved(tmp_path, "opt"), length=length)
    assert not caplog.records
    asked(rope_type="yarn", length=length)
    assert not caplog.records
    asked(length=length)
    assert "rows of 1,048,576 tokens are longer than" in caplog.text and "yarn" in caplog.text


def test_a_factor_gives_as_many_positions(caplog):
    for kind in ("yarn", "linear", "llama3"):
        given = {**GIVEN[kind][0], "rope_type": kind}
        config = asked(rope_parameters=given, length=2048)
        assert config.max_position_embeddings == 2048 and not caplog.records
    asked(rope_parameters={"rope_type": "yarn", "factor": 2.0}, length=2048)
    assert "longer than the 1,024 positions" in caplog.text


def test_an_adapter_has_the_positions_it_was_trained_with(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    settings = {"model": {"name": MODEL, "rope_type": "yarn"}, "full": True}
    settings["data"] = {"dataset": "b.txt", "tokens": 2048}
    (tmp_path / "lemo_train.yaml").write_text(yaml.safe_dump(settings))
    config = ModelOptions(MODEL, adapter=str(tmp_path)).load(1024)[0].config
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["factor"] == 4
    own = ModelOptions(MODEL, adapter=str(tmp_path), rope_type="linear").load(1024)[0].config
    assert own.rope_parameters["rope_type"] == "linear" and own.rope_parameters["factor"] == 2


def test_broken_configs(lemo, tmp_path):
    """Of the model itself."""
    config = json.loads(Path(MODEL, "config.json").read_text())
    for key, value in {"rope_parameters": {"rope_type": "yarn"}, "hidden_size": "wide"}.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        code, _, err = lemo("eval", "perplexity", "--model", tmp_path, "--dataset", BOOK)
        assert code == 2 and "the config of" in err and "Traceback" not in err


def test_nothing_asked_nothing_changed(tmp_path):
    name = saved(tmp_path, "opt")
    assert asked(name).to_dict() == AutoConfig.from_pretrained(name).to_dict()
    assert ModelOptions(name).load(512)[0].config.max_position_embeddings == 512
