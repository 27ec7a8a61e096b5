"""A README.md that lies in the output of `lemo train`."""

import pytest

STEPS = ("--training.save_strategy", "steps", "--training.save_steps", 2)


@pytest.mark.parametrize("way", [(), ("--dense",), ("--full",)])
def test_a_users_readme_stays(lemo, tmp_path, config, way, caplog):
    readme = tmp_path / "out" / "README.md"
    readme.parent.mkdir()
    readme.write_bytes(b"# My project\n\nWords\xff of mine.\n" if "--full" in way else b"# Mine\n")
    before = readme.read_bytes()
    code, _, err = lemo("train", "--config", config, "--json", *STEPS, *way)
    assert code == 0 and readme.read_bytes() == before, err
    assert "README.md is no model card of a run: it stays as it is" in caplog.text


def test_what_a_user_adds_to_a_card_stays(lemo, tmp_path, config):
    readme = tmp_path / "out" / "README.md"
    code, _, err = lemo("train", "--config", config, "--json", *STEPS)
    assert code == 0, err
    assert "generated automatically" in readme.read_text()  # Trainer's
    readme.write_text(readme.read_text() + "\nWords of mine.\n")
    more = ("--resume", "--training.max_steps", 4)
    code, _, err = lemo("train", "--config", config, "--json", *STEPS, *more)
    text = readme.read_text()
    assert code == 0 and "Words of mine." in text, err
    assert text.count("## Training with LeMo") == 1 and "| optimizer steps | 4, of" in text
