"""What does nothing, or other than was asked, is said: in one line, and once."""

import logging

import pytest
from support.callback_cases import with_callback
from support.paths import DEMO
from support.trainers import dataset, make_trainer
from transformers import AutoTokenizer

from lemo_hf import LeMoConfig
from lemo_hf.cli.train_rows import collator

RUN = LeMoConfig(retention=0.3, policy="random", dense_finish=0)


def first_line(out, tmp_path, lengths, answers=None, **fields):
    """What a run says of its first batch, rows of these lengths."""
    config = LeMoConfig(**{"retention": 0.3, "policy": "random", **fields})
    data = [dataset(1, n, answers)[0] for n in lengths]
    trainer = make_trainer(
        tmp_path,
        config,
        data=data,
        data_collator=collator(AutoTokenizer.from_pretrained(DEMO / "model")),
        max_steps=1,
        per_device_train_batch_size=len(lengths),
    )
    out.readouterr()
    trainer.train()
    (line,) = [x for x in out.readouterr().out.splitlines() if "-token row" in x]
    return line


def test_a_share_that_is_rounded_up(capsys, tmp_path):
    line = first_line(capsys, tmp_path, [1024], retention=0.4)
    assert "about 448 tokens (44%, not 40%: shares are rounded up to whole 64-token blocks)" in line
    line = first_line(capsys, tmp_path, [200])
    assert "about 72 tokens (36%, not 30%: shares are rounded up to whole 64-token blocks)" in line
    line = first_line(capsys, tmp_path, [150], block_size=64)
    assert "86 tokens (57%, not 30%: first and last blocks of documents" in line
    line = first_line(capsys, tmp_path, [1024], retention=0.5)
    assert "about 512 tokens (50%) train in each sparse layer, in every step." in line


def test_rows_that_are_too_short(capsys, tmp_path):
    line = first_line(capsys, tmp_path, [640, 100, 80])
    assert "192 tokens (30%) train in each sparse layer (2 of the 3 rows of this batch are" in line
    line = first_line(capsys, tmp_path, [100, 80])
    assert "all tokens train: it is too short, or has too many labels, to leave any out." in line


@pytest.mark.parametrize("make", [make_trainer, with_callback])
def test_a_run_that_leaves_nothing_out_is_told_once(make, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "lemo_hf"):
        make(tmp_path, RUN, data=dataset(tokens=100)).train()
    assert caplog.text.count("rows keep 100% of their tokens, and retention=0.3 was asked for") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lemo_hf"):
        make(tmp_path, RUN, data=dataset(tokens=640)).train()  # 30 %
        make(tmp_path, LeMoConfig(retention=1.0), data=dataset(tokens=100)).train()  # as asked
    assert "of their tokens" not in caplog.text


def test_a_dense_finish_is_no_idle_run(tmp_path, caplog):
    config = LeMoConfig(retention=0.3, policy="random", dense_finish=0.5)
    with caplog.at_level(logging.WARNING, "lemo_hf"):
        make_trainer(tmp_path, config, data=dataset(tokens=640)).train()
    assert "of their tokens" not in caplog.text


def test_a_trainer_without_a_config_says_so(tmp_path, capsys):
    line = "LeMo: there is no lemo_config, so every layer trains all tokens."
    make_trainer(tmp_path, None, max_steps=1).train()
    assert capsys.readouterr().out.count(line) == 1
    make_trainer(tmp_path, RUN, max_steps=1).train()
    make_trainer(tmp_path, None, max_steps=1, log_level="error").train()
    assert line not in capsys.readouterr().out
