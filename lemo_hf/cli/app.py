"""The command `lemo` and its commands."""

import os
import sys

import typer

from lemo_hf.cli.calibrate import calibrate
from lemo_hf.cli.env import env
from lemo_hf.cli.evaluate import app as evaluations
from lemo_hf.cli.inspect import inspect
from lemo_hf.cli.merge import merge
from lemo_hf.cli.plan import plan
from lemo_hf.cli.report import report
from lemo_hf.cli.train import SETTINGS, train
from lemo_hf.cli.train_predictor import train_predictor
from lemo_hf.shown import shortened

MOST_LETTERS = 4000  # of a message

app = typer.Typer(
    help="LeMo for Hugging Face: long-context fine-tuning on the tokens each layer needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # whose tables cut long options at 80 columns
)
app.command(context_settings=SETTINGS)(train)
for command in (plan, calibrate, train_predictor, inspect, report, merge, env):
    app.command()(command)
app.add_typer(evaluations, name="eval", short_help=evaluations.info.help)
for listed in (*app.registered_commands, *evaluations.registered_commands):
    listed.short_help = (listed.callback.__doc__ or "").partition("\n\n")[0]  # else it is cut


def main() -> None:
    """Run the command line: exit code 2 and one line for a mistake of the user, else 1.

    LEMO_TRACEBACK=1 shows where a mistake was found.
    """
    try:
        app(prog_name="lemo")
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("LEMO_TRACEBACK") == "1":
            raise
        typer.secho(f"lemo: {shortened(str(error), MOST_LETTERS)}", fg=typer.colors.RED, err=True)
        sys.exit(2)
    except Exception as error:
        said = _in_a_line(error)
        if said is None or os.environ.get("LEMO_TRACEBACK") == "1":
            raise
        typer.secho(f"lemo: {said}", fg=typer.colors.RED, err=True)
        sys.exit(1)


def _in_a_line(error: Exception) -> str | None:
    """What is no mistake of the user and no error of ours; None of other errors."""
    first = f"{error}".partition("\n")[0]
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"out of memory: {first} Shorter rows, a lower retention, gradient checkpointing or "
            "lemo.offload_gib take less; `lemo plan` says how much."
        )
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):
        return (
            f"the Hub cannot be reached ({type(error).__name__}: {first}). What was written before "
            "is whole; `hf upload` sends it."
        )
    return None
