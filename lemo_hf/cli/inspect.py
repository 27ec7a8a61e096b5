"""`lemo inspect`."""

import dataclasses
import json
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lemo_hf.cli.options import AsJson, ModelOptions, path_option, takes_model
from lemo_hf.config import POLICIES, LeMoConfig
from lemo_hf.storage.files import near_path, read_text
from lemo_hf.storage.outputs import check_output
from lemo_hf.storage.tables import suffix_of

if TYPE_CHECKING:
    from lemo_hf.inspection.kept import KeptByPolicy
    from lemo_hf.inspection.layers import Inspection


@takes_model
def inspect(
    model: ModelOptions,
    text: Annotated[Path, typer.Option(help="Text file.")],
    output: Annotated[
        Path | None,
        path_option(help="Directory for the pictures."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Number of first tokens to read; default: at most 8192."),
    ] = None,
    retention: Annotated[
        float | None, typer.Option(help="Share of the tokens that each layer keeps; default: 0.3.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Directory or Hub id of a lemo_config.json to start from."),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help=f"Ranking of the blocks: {', '.join(POLICIES)}.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens a block.")] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Let each layer choose its own blocks.")
    ] = False,
    question: Annotated[
        str | None, typer.Option(help="Question after the text; only its answer has labels.")
    ] = None,
    answer: Annotated[str | None, typer.Option(help="Answer to the question.")] = None,
    needle: Annotated[
        list[str] | None, typer.Option(help="Words of the text to mark; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw which blocks of your text your model attends to, and which LeMo would keep."""
    if output is None and not as_json:
        raise ValueError("give --output DIR for the pictures, or --json for the numbers, or both.")
    if not text.is_file():
        raise FileNotFoundError(f"--text {text}: there is no such file{near_path(text)}")
    if suffix_of(str(text)) not in (None, ".txt"):
        raise ValueError(
            f"--text {text} holds rows, not a text: write the text of one row into a .txt file."
        )
    if (question is None) != (answer is None):
        lone = f"--question {question!r} without --answer"
        if question is None:
            lone = f"--answer {answer!r} without --question"
        raise ValueError(f"{lone}: give both, or neither to label the whole text.")
    if output is not None:
        check_output(output, "--output", directory=True)
        for name in ("kept.txt", "kept.json"):
            check_output(output / name, "--output", inputs=[text])
    start = LeMoConfig() if config is None else LeMoConfig.from_pretrained(config)
    given = {"retention": retention, "policy": policy, "block_size": block_size}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if retention is not None:
        changes |= {"threshold": None, **_finish_of(start, retention)}
    if policy is not None:
        changes |= {"predictor": None, "predictor_revision": None}
    if per_layer:
        changes["agree_across_layers"] = False
    lemo_config = dataclasses.replace(start, **changes)
    if output is not None:
        from lemo_hf.eval.plots import check_plots

        check_plots()
    from lemo_hf.inspection.kept import FEW, compare_policies
    from lemo_hf.inspection.layers import inspect_text
    from lemo_hf.inspection.row import text_row

    lm, tokenizer = model.load(tokens or 8192)
    words = read_text(text)
    row = text_row(tokenizer, words, tokens or 8192, question, answer, needle or ())
    if tokens is not None and len(row.input_ids) < tokens:
        raise ValueError(
            f"--tokens {tokens}: {text} has only {len(row.input_ids)} tokens. Give fewer."
        )
    blocks = -(-len(row.input_ids) // lemo_config.block_size)
    if blocks < FEW:
        raise ValueError(
            f"--text {text}: {len(row.input_ids)} tokens are {blocks} blocks of "
            f"{lemo_config.block_size}, and a picture needs {FEW}: give more text, or a smaller "
            "--block-size."
        )
    shown = not as_json
    labels = None if question is None else row.labels
    found = inspect_text(lm, row.input_ids, lemo_config, progress=shown, labels=labels)
    comparable = lemo_config
    if lemo_config.threshold is not None:  # policies are compared at the share that it keeps
        sparse = map(bool, lemo_config.layer_rules(len(found.recall)))
        shares = list(compress(found.retention["attention"], sparse))
        mean = sum(shares) / len(shares)
        shared = _finish_of(lemo_config, mean)
        comparable = dataclasses.replace(lemo_config, retention=mean, threshold=None, **shared)
    compared = compare_policies(lm, tokenizer, row, comparable, progress=shown)
    if as_json:
        what = {"model": model.model, "adapter": model.adapter, "text": str(text)}
        result = {**what, **found.to_dict(), "by_policy": compared.to_dict()}
        print(json.dumps(result), flush=True)
    else:
        _tell(found, compared)
    if output is not None:
        from lemo_hf.inspection.kept_plots import save_comparison
        from lemo_hf.inspection.layer_plots import save_figures

        for path in (*save_figures(found, output), *save_comparison(compared, output)):
            if not as_json:
                print(f"Wrote {path}")


def _finish_of(config: LeMoConfig, retention: float) -> dict[str, Any]:
    """Changes for ``config`` at another retention: a finish that would keep less is left out."""
    return {"dense_finish": 0} if config.finish_retention < retention else {}


def _tell(found: "Inspection", compared: "KeptByPolicy") -> None:
    """Print the numbers as text."""
    from lemo_hf.inspection.layers import SMALL

    print("layer  attention     MLP  recall")
    kept = zip(found.retention["attention"], found.retention["mlp"], found.recall, strict=True)
    for layer, (attention, mlp, recall) in enumerate(kept):
        share = "-" if recall is None else f"{recall:.3f}"
        print(f"{layer:>5}  {attention:>9.3f}  {mlp:>6.3f}  {share:>6}")
    for length, layers in found.sparsity.items():
        small = sum(layers) / len(layers)
        print(
            f"{length:>9,} tokens: {small:.1%} of the blocks below {SMALL:g} of their layer's best"
        )
    print(f"\n{compared.to_text()}", flush=True)
