"""`lemo eval perplexity`, `lemo eval longbench` and `lemo eval retrieval`."""

import json
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from lemo_hf.cli.idle import refuse_idle
from lemo_hf.cli.options import (
    MODEL,
    AsJson,
    Dataset,
    ModelOptions,
    Split,
    TextColumn,
    path_option,
    takes_model,
)
from lemo_hf.storage.files import whole_file, write_json
from lemo_hf.storage.outputs import check_output, check_replaces_no_model

app = typer.Typer(
    help="Evaluate a model, with or without an adapter. Evaluation is dense.",
    no_args_is_help=True,
)

Output = Annotated[Path | None, path_option(help="JSON file for the result.")]
Plot = Annotated[Path | None, path_option(help="PNG file for the picture.")]
RESULT = ("model", "adapter", "dataset")  # first keys of a result, by which it is known
BatchSize = Annotated[int, typer.Option(min=1, help="Rows a pass on each device.")]


class Protocol(StrEnum):
    """Protocols of perplexity."""

    sliding = "sliding"
    longlora = "longlora"


@app.command()
@takes_model
def perplexity(
    model: ModelOptions,
    dataset: Dataset,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 8192,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens between windows; default: half a window, 256 for longlora."
        ),
    ] = None,
    protocol: Annotated[
        Protocol,
        typer.Option(help="sliding: scores each token once. longlora: scores whole windows."),
    ] = Protocol.sliding,
    buckets: Annotated[int, typer.Option(min=1, help="Number of ranges of positions.")] = 8,
    max_documents: Annotated[
        int | None, typer.Option(min=1, help="Number of first documents to read.")
    ] = None,
    split: Split = "test",
    text_column: TextColumn = "text",
    batch_size: BatchSize = 1,
    output: Output = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Measure the perplexity of whole documents, overall and by position, in text or .bin files
    (uint16)."""
    _check(output, plot, dataset)

    from accelerate import PartialState

    from lemo_hf.eval.perplexity import perplexity as measure

    _check_documents(dataset, split, text_column)
    lm, tokenizer = model.load(max_length)
    shown = PartialState().is_main_process and not as_json
    documents = _token_documents(dataset, split, text_column, tokenizer, max_documents, shown)
    found = measure(
        lm,
        documents,
        max_length=max_length,
        stride=stride,
        protocol=protocol.value,
        batch_size=batch_size,
        buckets=buckets,
        progress=not as_json,
    )
    if not PartialState().is_main_process:
        return
    result = {**_what(model, dataset), **found.to_dict()}
    if as_json:
        print(json.dumps(result), flush=True)
    else:
        print(
            f"perplexity {found.perplexity:.4f} ({found.loss:.4f} nats a token), "
            f"{found.tokens:,} tokens of {found.documents} documents; protocol {found.protocol}, "
            f"windows of {found.max_length:,}, stride {found.stride:,}"
        )
        for row in found.by_position:
            print(
                f"  tokens of context {row['first']:>7,} to {row['last']:>7,}: "
                f"{row['perplexity']:.4f}",
                flush=True,
            )
    _write(result, output, as_json)
    if plot is not None:
        from lemo_hf.eval.plots import loss_by_position_figure

        name = model.adapter or model.model
        _draw(loss_by_position_figure({name: found.by_position}), plot, as_json)


@app.command()
@takes_model
def longbench(
    options: ModelOptions,
    context: typer.Context,
    output: Annotated[
        Path,
        path_option(
            help="Directory for predictions; an interrupted run resumes.",
        ),
    ],
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task, of 21 (13 with --extended); repeatable; default: all."),
    ] = None,
    score_only: Annotated[
        bool, typer.Option("--score-only", help="Only score the predictions in --output.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="Folder or zip with the data; default: the Hub's.")
    ] = None,
    extended: Annotated[bool, typer.Option("--extended", help="Run LongBench-E.")] = False,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Most tokens of a prompt; default: what the context holds."),
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(min=1, help="Number of first rows of a task.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option(help="Use the tokenizer's chat template where the benchmark does.")
    ] = True,
    batch_size: BatchSize = 1,
    as_json: AsJson = False,
) -> None:
    """Answer LongBench and score the answers, as its own scripts do; or only score a folder."""
    if score_only:
        refuse_idle(
            context, "with --score-only", but=("output", "score_only", "extended", "as_json")
        )
        from lemo_hf.eval.longbench_score import score_predictions

        scores = score_predictions(output, extended=extended)
    elif options.model is None:
        raise ValueError("give --model, or --score-only to score what lies in --output.")
    else:
        check_output(output, "--output", directory=True)

        from accelerate import PartialState

        from lemo_hf.eval.longbench import run_longbench
        from lemo_hf.eval.longbench_tasks import choose_tasks

        choose_tasks(task or None, extended=extended)
        lm, tokenizer = options.load()
        scores = run_longbench(
            lm,
            tokenizer,
            output,
            task or None,
            data=data,
            extended=extended,
            max_length=max_length,
            batch_size=batch_size,
            chat_template=chat_template,
            max_rows=max_rows,
            progress=not as_json,
        )
        if not PartialState().is_main_process:
            return
    if as_json:
        print(json.dumps(scores), flush=True)
    else:
        for name, score in scores.items():
            buckets = score.items() if isinstance(score, dict) else [("", score)]
            print(f"{name:22}" + "".join(f"{bucket:>6} {value:6.2f}" for bucket, value in buckets))
    if score_only:
        from lemo_hf.eval.longbench_score import write_scores

        write_scores(output, scores)
    if not as_json:
        print(f"Wrote {output / 'result.json'}")


@app.command()
@takes_model
def retrieval(
    model: ModelOptions,
    dataset: Dataset,
    length: Annotated[
        list[int] | None, typer.Option(min=2, help="Tokens a row; repeatable; default 2K to 8K.")
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option(help="Share of the text before the needle; repeatable; default 0 to 1."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows for each length and depth.")] = 8,
    keys: Annotated[
        int, typer.Option(min=1, help="Number of lines with a key; one is asked for.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of keys, values and places.")] = 0,
    split: Split = "test",
    text_column: TextColumn = "text",
    batch_size: BatchSize = 1,
    output: Output = None,
    plot: Plot = None,
    as_json: AsJson = False,
) -> None:
    """Ask for lines hidden in real text at chosen lengths and depths (needle in a haystack)."""
    _check(output, plot, dataset)

    from accelerate import PartialState

    from lemo_hf.eval.needles import needle_rows
    from lemo_hf.eval.retrieval import retrieval as measure
    from lemo_hf.storage.text_rows import check_documents, load_documents

    lengths = length or [2048, 4096, 8192]
    check_documents(dataset, split, text_column)
    lm, tokenizer = model.load(max(lengths))
    main = PartialState().is_main_process
    rows = needle_rows(
        load_documents(dataset, split, text_column),
        tokenizer,
        lengths=lengths,
        depths=depth or [0.0, 0.25, 0.5, 0.75, 1.0],
        samples=samples,
        keys=keys,
        seed=seed,
        progress=main and not as_json,
    )
    found = measure(lm, rows, batch_size=batch_size, progress=not as_json)
    if not main:
        return
    result = {**_what(model, dataset), "keys": keys, "seed": seed, **found.to_dict()}
    print(json.dumps(result) if as_json else found.format_table(), flush=True)
    _write(result, output, as_json)
    if plot is not None:
        from lemo_hf.eval.plots import retrieval_figure

        _draw(retrieval_figure(found), plot, as_json)


def _binary(dataset: Sequence[str]) -> list[str]:
    """The .bin files, if all datasets are such files."""
    binary = [path for path in dataset if path.endswith(".bin")]
    if binary and len(binary) < len(dataset):
        raise ValueError(f"datasets must be all .bin files or none, got {', '.join(dataset)}.")
    return binary


def _check_documents(dataset: Sequence[str], split: str, text_column: str) -> None:
    """Raise errors of `_token_documents` that can be found before a model is loaded."""
    from lemo_hf.storage.tables import check_file
    from lemo_hf.storage.text_rows import check_documents

    if binary := _binary(dataset):
        for path in binary:
            check_file(path)
    else:
        check_documents(dataset, split, text_column)


def _token_documents(
    dataset: Sequence[str],
    split: str,
    text_column: str,
    tokenizer: Any,
    most: int | None,
    progress: bool,
) -> list[Sequence[int]]:
    """Token ids of each document; a .bin file is one document.

    All documents are read before the first is evaluated, so that the time left is known.
    """
    from itertools import islice

    import numpy as np
    from tqdm.auto import tqdm

    from lemo_hf.eval.token_files import read_token_file
    from lemo_hf.storage.text_rows import load_documents

    if binary := _binary(dataset):
        return [cast(Sequence[int], read_token_file(path)) for path in binary[:most]]
    texts = islice(load_documents(dataset, split, text_column), most)
    shown = tqdm(texts, total=most, desc="documents", disable=not progress)
    ids = (tokenizer(text, verbose=False)["input_ids"] for text in shown)
    return [cast(Sequence[int], np.asarray(x, dtype=np.int32)) for x in ids]


def _what(model: ModelOptions, dataset: Sequence[str]) -> dict[str, Any]:
    return dict(zip(RESULT, (model.model, model.adapter, list(dataset)), strict=True))


def _check(output: Path | None, plot: Path | None, dataset: Sequence[str]) -> None:
    """Refuse, before the evaluation, outputs that could not be written after it."""
    if output is not None and plot is not None and output.absolute() == plot.absolute():
        raise ValueError(f"--output and --plot are both {output}: give two names.")
    if output is not None:
        check_output(output, "--output", inputs=dataset, ending=".json")
        check_replaces_no_model(output, "--output", RESULT)
    if plot is not None:
        from lemo_hf.eval.plots import check_plots

        check_output(plot, "--plot", inputs=dataset, ending=".png")
        check_plots()


def _write(result: dict[str, Any], output: Path | None, as_json: bool) -> None:
    """Write the result, which was printed, into a file."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as part:
        write_json(part, result)
    if not as_json:
        print(f"Wrote {output}")


def _draw(figure: Any, plot: Path, as_json: bool) -> None:
    from lemo_hf.eval.plots import save_figure

    plot.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, plot)
    if not as_json:
        print(f"Wrote {plot}")
