"""What trainers say of a run: as much as `TrainingArguments(log_level=...)` asks for."""

import logging

from transformers import TrainingArguments


def announce(args: TrainingArguments, line: str) -> None:
    """Print ``line`` once for all processes, unless this run is asked for errors alone.

    What transformers' own verbosity is, as it is by ``"passive"``, says nothing of this line: who
    quiets a library is to see what trains all the same.
    """
    asked = args.log_level == "passive" or args.get_process_log_level() <= logging.WARNING
    if args.process_index == 0 and asked:
        print(line)


def follow_log_level(args: TrainingArguments) -> None:
    """Let lemo-hf's loggers say what transformers' say; ``"passive"`` leaves both as they are."""
    if args.log_level != "passive":
        logging.getLogger("lemo_hf").setLevel(args.get_process_log_level())
