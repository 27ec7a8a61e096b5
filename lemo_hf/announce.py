"""What trainers print about a run, as `TrainingArguments(log_level=...)` asks."""

import logging

from transformers import TrainingArguments


def announce(args: TrainingArguments, line: str) -> None:
    """Print ``line`` once for all processes, unless the run logs errors alone.

    transformers' own verbosity, which ``"passive"`` leaves as it is, does not hide this line: users
    who quiet a library still see what trains.
    """
    asked = args.log_level == "passive" or args.get_process_log_level() <= logging.WARNING
    if args.process_index == 0 and asked:
        print(line)


def follow_log_level(args: TrainingArguments) -> None:
    """Give lemo-hf's loggers the level of transformers'; ``"passive"`` changes neither."""
    if args.log_level != "passive":
        logging.getLogger("lemo_hf").setLevel(args.get_process_log_level())
