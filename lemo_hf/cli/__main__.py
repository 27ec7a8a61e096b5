"""``python -m lemo_hf.cli``, where the command `lemo` is not on the path."""

from lemo_hf.cli.app import main

main()
