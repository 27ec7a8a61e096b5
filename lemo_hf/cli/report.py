"""`lemo report`."""

from pathlib import Path
from typing import Annotated

import typer

from lemo_hf.cli.options import path_option
from lemo_hf.storage.outputs import check_output


def report(
    run_dir: Annotated[Path, typer.Argument(help="Output directory of a training run.")],
    output: Annotated[
        Path | None,
        path_option(
            help="HTML file; default: report.html in the directory.",
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page of a training run."""
    from lemo_hf.report.page import write_report

    if output is not None:
        check_output(output, "--output", ending=".html")
    print(f"Wrote {write_report(run_dir, output)}")
