"""``python -m lemo_hf.cli``, for when the command `lemo` is not on the path."""

from lemo_hf.cli.app import main

main()
