"""The command `lemo` and its commands."""

import sys

import typer

from lemo_hf.cli.calibrate import calibrate
from lemo_hf.cli.evaluate import app as evaluations
from lemo_hf.cli.plan import plan
from lemo_hf.cli.train_predictor import train_predictor

app = typer.Typer(
    help="LeMo for Hugging Face: long-context fine-tuning on the tokens each layer needs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (plan, calibrate, train_predictor):
    app.command()(command)
app.add_typer(evaluations, name="eval")


def main() -> None:
    """Run the command line; a mistake of the user is one line and exit code 2."""
    try:
        app(prog_name="lemo")
    except (ValueError, OSError, ImportError) as error:
        typer.secho(f"lemo: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)
