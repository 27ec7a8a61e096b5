"""What a run that goes on, or starts over, says of the one before it."""

import json
import os
import shutil

from support.train_run import MODEL


def small(config, *more):
    steps = ("--training.save_strategy", "steps", "--training.save_steps", 2)
    return ("train", "--config", config, *steps, "--training.max_steps", 2, *more)


def test_evaluations_of_weights_before_are_not_shown(lemo, tmp_path, config, caplog):
    out = tmp_path / "out"
    code, _, err = lemo(*small(config))
    assert code == 0, err
    measure = ("eval", "perplexity", "--model", MODEL, "--adapter", out, "--max-length", 64)
    data = ("--dataset", tmp_path / "book.txt", "--output", out / "perplexity.json")
    (tmp_path / "book.txt").write_text((tmp_path / "book.txt").read_text()[:2000])
    code, _, err = lemo(*measure, *data, "--device", "cpu")
    assert code == 0, err
    code, _, err = lemo("report", out)
    page = (out / "report.html").read_text()
    assert code == 0 and "<h3>perplexity.json</h3>" in page and "Left out" not in page, err
    code, _, err = lemo(*small(config, "--overwrite", "--report", "--training.seed", 5))
    page = (out / "report.html").read_text()
    assert code == 0 and "<h3>perplexity.json</h3>" not in page, err
    assert "Left out, since the weights were written after it: perplexity.json." in page
    assert "perplexity.json is left out of the page" in caplog.text


def test_a_finished_run_keeps_its_results_and_its_card(lemo, tmp_path, config):
    out = tmp_path / "out"
    for length in (("--training.max_steps", 2), ("--training.num_train_epochs", 1)):
        limit = ("--data.max_rows", 4, "--training.max_steps", -1, *length)
        code, _, err = lemo(*small(config, "--overwrite", *limit))
        assert code == 0, err
        names = ("train_results.json", "all_results.json", "README.md", "trainer_state.json")
        before = {name: (out / name).read_bytes() for name in names}
        weights = (out / "adapter_model.safetensors").stat().st_mtime_ns
        code, printed, err = lemo(*small(config, "--resume", *limit))
        assert code == 0 and "was finished at step 2" in printed, err
        assert "train_loss" not in printed and "Wrote" not in printed
        assert before == {name: (out / name).read_bytes() for name in names}
        assert weights == (out / "adapter_model.safetensors").stat().st_mtime_ns
    (out / "trainer_state.json").unlink()  # killed before its end
    os.remove(out / "README.md")
    code, printed, err = lemo(*small(config, "--resume", *limit))
    assert code == 0 and f"Wrote {out}" in printed and (out / "README.md").is_file(), err
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
    assert before["train_results.json"] == (out / "train_results.json").read_bytes()


def test_another_model_is_refused_and_other_rows_are_told(lemo, tmp_path, config, caplog):
    code, _, err = lemo(*small(config))
    assert code == 0, err
    other = tmp_path / "model"
    shutil.copytree(MODEL, other)
    longer = small(config, "--resume", "--training.max_steps", 3)
    for flags, said in (
        (("--model", other), (f"model.name={MODEL!r}", f"model.name={str(other)!r}")),
        (("--model.dtype", "bfloat16"), ("dtype='float32'", "dtype='bfloat16'")),
        (("--model.max_position_embeddings", 600), ("=None", "max_position_embeddings=600")),
    ):
        code, _, err = lemo(*longer, *flags)
        assert code == 2 and all(words in err for words in said), err
    (tmp_path / "link").symlink_to(MODEL)
    shutil.copy(tmp_path / "book.txt", tmp_path / "b.txt")
    rows = ("--dataset", tmp_path / "b.txt", "--tokens", 128, "--model", tmp_path / "link")
    code, _, err = lemo(*longer, *rows)
    assert code == 0, err
    names = [str(tmp_path / name) for name in ("book.txt", "b.txt")]
    for key, (was, now) in (("dataset", names), ("tokens", (256, 128))):
        assert f"made with data.{key}={was!r}, and this run goes on with data.{key}={now!r}" in (
            caplog.text
        )
