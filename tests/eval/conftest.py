"""What the tests of needles share."""

from support.needle_rows import books, tokenizer

__all__ = ["books", "tokenizer"]
