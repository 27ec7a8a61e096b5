"""`lemo inspect`: policies side by side keep what they keep in training, and the files say so."""

import dataclasses
import json
import math

import pytest
import torch
from matplotlib.image import imread
from support.hub_client import make_predictor
from support.inspected import IDS, training_pass
from support.models import make_model
from support.paths import DEMO
from transformers import AutoTokenizer

from lemo_hf import LeMoConfig
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.inspection.kept import compare_policies, kept_in_words
from lemo_hf.inspection.kept_plots import policies_figure
from lemo_hf.inspection.row import TextRow, text_row
from lemo_hf.inspection.words import shared_words
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX

QUESTION = "Where do people in Hillerton go boating in summer and skating in winter?"
ANSWER = "On the tiny pond of the common."
NEEDLE = "a few boats in summer"


class Numbers:
    """A tokenizer that writes ids as numbers."""

    @staticmethod
    def decode(ids):
        return " ".join(map(str, ids))


def answered(ids, start, end):
    """Labels on a part of ``ids``."""
    return [x if start <= i < end else IGNORE_INDEX for i, x in enumerate(ids)]


OWN_SETS = {"mlp_retention": 0.7, "agree_across_layers": False}


@pytest.mark.parametrize(
    ("config", "asks"),
    [
        (LeMoConfig(block_size=8, chunk_size=16), False),
        (LeMoConfig(block_size=8, chunk_size=16), True),
        (LeMoConfig(block_size=8, dense_first_layers=2, seed=3, random_share=0.3), True),
        (LeMoConfig(block_size=16, chunk_size=16, dense_finish=0.2, **OWN_SETS), False),
    ],
)
def test_each_policy_is_shown_as_it_trains(config, asks):
    model = make_model("llama")
    labels = answered(IDS, 130, 139) if asks else IDS
    row = TextRow(IDS, labels, *(("Which?", "That.") if asks else (None, None)))
    found = compare_policies(model, Numbers, row, config, progress=False)
    assert model.training and not hasattr(model, "_lemo")
    names = [kept.name for kept in found.rows]
    assert names[:1] == (["overlap"] if asks else ["chunks, step 1"])
    assert ("last 10 % of steps" in names) == (not asks and config.dense_finish is None)
    assert ("last 20 % of steps" in names) == (config.dense_finish == 0.2)
    for kept in found.rows:
        step = (0, None)
        policy = kept.policy
        if "step " in kept.name:
            step = (int(kept.name[-1]) - 1, 10)
        if kept.name.startswith("last"):
            step = (9, 10)
        mixed = policy in ("auto", "overlap", "predictor")
        settings = dataclasses.replace(
            config,
            policy=policy,
            random_share=config.random_share if mixed else 0,
            mlp_retention=None,
            agree_across_layers=True,
        )
        sets = training_pass(model, settings, IDS, labels, step)
        assert kept.kept == sets[config.dense_first_layers, "attention"], kept.name
    drawn = [tuple(kept.kept) for kept in found.rows if kept.policy == "chunks"]
    assert len(drawn) == 3 and len(set(drawn)) > 1


def test_predictors_are_compared_too(tmp_path):
    make_predictor().save_pretrained(tmp_path)
    config = LeMoConfig(block_size=8, predictor=str(tmp_path))
    model = make_model("llama")
    row = TextRow(IDS, answered(IDS, 130, 139), "Which?", "That.")
    found = compare_policies(model, Numbers, row, config, ["predictor", "recent"], progress=False)
    sets = training_pass(model, config, IDS, row.labels)
    assert found.rows[0].kept == sets[0, "attention"]
    assert [kept.name for kept in found.rows] == ["predictor", "recent"]


@pytest.mark.parametrize(("policy", "shown"), [("recent", 9), ("pooled", None)])
def test_a_finish_that_leaves_something_out(policy, shown):
    config = LeMoConfig(block_size=8, policy=policy, dense_finish=0.5, finish_retention=0.45)
    row = TextRow(IDS, IDS)
    found = compare_policies(make_model("llama"), Numbers, row, config, ["chunks"], progress=False)
    finish = [sum(kept.kept) for kept in found.rows if kept.name == "last 50 % of steps"]
    assert finish == ([] if shown is None else [shown])  # of 19 blocks


def test_a_finish_that_keeps_less_than_the_mean_of_the_layers():
    shares = {"retention": (0.3, 0.3, 0.8, 0.8), "dense_finish": 0.5, "finish_retention": 0.4}
    config = LeMoConfig(block_size=8, policy="recent", agree_across_layers=False, **shares)
    row = TextRow(IDS, IDS)
    found = compare_policies(make_model("llama"), Numbers, row, config, ["chunks"], progress=False)
    assert [(kept.name, sum(kept.kept)) for kept in found.rows] == [
        ("chunks", 11),
        ("last 50 % of steps", 8),  # of 19 blocks
    ]


def test_words_that_are_shared():
    """Ids as words: a block that holds the question's pair, one that holds a half, one neither."""
    ids = list(range(1000, 1000 + 320))
    ids[312:314] = ids[40:42] = [1, 2]  # blocks 39 and 5
    ids[90] = 1
    ids[11] = ids[315] = 3
    targets = torch.tensor([answered(ids, 313, 320)]).roll(-1, 1)
    batch = torch.tensor([ids])
    sparse_pass = SparsePass(
        LeMoConfig(block_size=8), (1, 320), batch.device, input_ids=batch, targets=targets
    )
    scores = torch.tensor(
        [[0.0, 4.0, 0.0, 1.0, 0.0, 9.0, *[0.0] * 5, 6.0, *[0.0] * 26, 20.0, 30.0]]
    )
    found = shared_words(sparse_pass, scores, Numbers.decode, most=3)
    assert [(x.block, x.first, x.last, x.score) for x in found] == [
        (5, 40, 47, 9.0),
        (11, 88, 95, 6.0),
        (1, 8, 15, 4.0),
    ]  # neither those that ask nor those that score nothing
    told = [[(words.text, words.blocks) for words in x.words] for x in found]
    assert told == [[("1 2", 1)], [("1", 2)], [("3", 1)]]
    assert found[0].words[0].nats == pytest.approx(math.log(40 / 2))  # the question's block too
    assert found[1].words[0].nats == pytest.approx(math.log(40 / 3))
    assert not shared_words(sparse_pass, scores, Numbers.decode)[3].words
    with pytest.raises(ValueError, match="one row of token ids, got 2 rows"):
        pair = SparsePass(LeMoConfig(), (2, 160), batch.device, input_ids=batch.view(2, 160))
        shared_words(pair, scores, Numbers.decode)


@pytest.fixture(scope="module")
def asked():
    """A real question about a real text, in the middle of which the answer stands."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "text" / "heldout-oh-money-money.txt").read_text()
    text = text[text.index(NEEDLE) - 6000 :]
    row = text_row(tokenizer, text, 4096, QUESTION, ANSWER, [NEEDLE])
    model = make_model("llama", vocab_size=2048)
    return row, tokenizer, compare_policies(model, tokenizer, row, LeMoConfig(), progress=False)


def test_overlap_keeps_the_passage_that_answers(asked):
    row, tokenizer, found = asked
    assert len(row.input_ids) == 4096
    labelled = [i for i, label in zip(row.input_ids, row.labels, strict=True) if label >= 0]
    assert row.labels[-len(labelled) :] == labelled == row.input_ids[-len(labelled) :]
    assert tokenizer.decode(labelled).strip() == ANSWER
    (passage,) = row.passages
    assert tokenizer.decode(row.input_ids[passage.first : passage.last + 1]).strip() == NEEDLE
    kept = {kept.name: kept.passages for kept in found.rows}
    assert kept["overlap"] == [1.0] and kept["recent"] == [0.0]
    best = found.shared[0]
    assert best.first <= passage.first <= best.last
    assert "tiny pond" in [words.text for words in best.words]
    said = found.to_text()
    assert f"block {best.block}, tokens {best.first:,}–{best.last:,}, kept: shares" in said
    assert "'tiny pond' (1 of 64 blocks)" in said and ", passage kept" in said


def test_the_picture_shows_what_the_file_holds(asked):
    *_, found = asked
    stored = json.loads(json.dumps(found.to_dict()))
    whole = dataclasses.replace(
        found, question=None, answer=None, passages=[], label_blocks=[False] * 64, shared=[]
    )
    figure = policies_figure(found, whole)
    for axis, labels in zip(figure.axes, (stored["label_blocks"], [False] * 64), strict=True):
        assert len(axis.collections) == len(stored["rows"]) == 9
        words = [text.get_text() for text in axis.texts]
        for mesh, kept in zip(axis.collections, stored["rows"], strict=True):
            shades = [k + (k and x) for k, x in zip(kept["kept"], labels, strict=True)]
            assert mesh.get_array()[0].tolist() == shades
            assert kept["name"] in words
    words = [text.get_text() for text in figure.axes[0].texts]
    fates = [kept_in_words(kept["passages"][0]) for kept in stored["rows"]]
    assert [word for word in words if word in ("kept", "left out", "kept in part")] == fates
    assert "labels" in words and any(QUESTION in word and ANSWER in word for word in words)
    (first,), _ = (line.get_xdata()[:1] for line in figure.axes[0].lines)
    assert first == stored["passages"][0]["first"] // 64 * 64


def test_rows_that_cannot_be_made():
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "text" / "heldout-oh-money-money.txt").read_text()[:9000]
    for arguments, message in (
        ((400, "Who?"), "question 'Who\\?' and answer None: give both"),
        ((400, None, "He."), "question None and answer 'He.': give both"),
        ((12, QUESTION, ANSWER), "more than fit a row of 12: give a longer row"),
        ((400, None, None, ["no such words"]), "'no such words' is not in the text"),
        ((400, None, None, [text[-60:]]), "the row has only the first 400"),
        ((400, None, None, [" "]), "is not in the text"),
    ):
        with pytest.raises(ValueError, match=message):
            text_row(tokenizer, text, *arguments)
    model = make_model("llama")
    with pytest.raises(ValueError, match="has 150 tokens, fewer than 8 blocks of 64"):
        compare_policies(model, Numbers, TextRow(IDS, IDS), LeMoConfig())
    with pytest.raises(ValueError, match="threshold=0.9 .* set a retention"):
        config = LeMoConfig(block_size=8, threshold=0.9)
        compare_policies(model, Numbers, TextRow(IDS, IDS), config)


def test_a_question_on_the_command_line(lemo, tmp_path):
    text = tmp_path / "t.txt"
    whole = (DEMO / "text" / "heldout-oh-money-money.txt").read_text()
    start = whole.index(NEEDLE)
    text.write_text(whole[start - 1500 : start + 2500])
    shared = ("inspect", "--model", DEMO / "model", "--text", text, "--dtype", "float32")
    shared = (*shared, "--tokens", 1024, "--block-size", 32)
    asking = (*shared, "--question", QUESTION, "--answer", ANSWER, "--needle", NEEDLE)
    code, out, err = lemo(*asking, "--output", tmp_path / "out", "--json")
    assert code == 0, err
    printed = json.loads(out)
    stored = json.loads((tmp_path / "out" / "kept.json").read_text())
    assert stored == printed["by_policy"]
    kept = {row["name"]: row for row in stored["rows"]}
    assert kept["overlap"]["passages"] == [1.0]
    code, out, err = lemo(*asking, "--policy", "overlap", "--json")
    assert code == 0, err
    assert json.loads(out)["kept"]["attention"][0] == kept["overlap"]["kept"]
    assert "tiny pond" in (tmp_path / "out" / "kept.txt").read_text()
    picture = imread(tmp_path / "out" / "kept.png")
    assert picture.shape[1] > 1200 and picture.std() > 0.05
    LeMoConfig(threshold=1.2, dense_first_layers=1).save_pretrained(tmp_path)
    code, out, err = lemo(*shared, "--config", tmp_path, "--json")  # compared at what it keeps
    assert code == 0, err
    printed = json.loads(out)
    share = sum(printed["retention"]["attention"][1:]) / 9
    assert printed["by_policy"]["retention"] == pytest.approx(share, abs=1e-5)
    little = {"dense_finish": 0.5, "finish_retention": 0.01}  # less than what is compared keeps
    LeMoConfig(threshold=1.2, dense_first_layers=1, **little).save_pretrained(tmp_path)
    for more in ((), ("--retention", 0.5)):
        code, out, err = lemo(*shared, "--config", tmp_path, *more, "--json")
        assert code == 0, err
        names = [row["name"] for row in json.loads(out)["by_policy"]["rows"]]
        assert not any("of steps" in name for name in names)
    for more, message in (
        (("--question", QUESTION), f"--question '{QUESTION}' without --answer: give both"),
        (("--answer", ANSWER), f"--answer '{ANSWER}' without --question: give both"),
        (("--block-size", 256), f"--text {text}: 1024 tokens are 4 blocks of 256"),
    ):
        code, _, err = lemo(*shared, "--json", *more)
        assert code == 2 and message in err and "Traceback" not in err
