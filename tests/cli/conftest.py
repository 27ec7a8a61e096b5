"""What tests of several commands need."""

import pytest
from support.train_run import MODEL, SETTINGS, TEXT


@pytest.fixture
def config(tmp_path):
    (tmp_path / "book.txt").write_text(TEXT)
    text = SETTINGS.replace("MODEL", MODEL).replace("BOOK", str(tmp_path / "book.txt"))
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("OUTPUT", str(tmp_path / "out")))
    return path
