"""`lemo inspect`."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo_hf.cli.options import AsJson, ModelOptions, takes_model
from lemo_hf.config import LeMoConfig


@takes_model
def inspect(
    model: ModelOptions,
    text: Annotated[Path, typer.Option(help="Text file.")],
    output: Annotated[Path | None, typer.Option(help="Directory for the pictures.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Of the text, the first ones; default: at most 8192.")
    ] = None,
    retention: Annotated[
        float | None, typer.Option(help="Share of the tokens each layer keeps. Default: 0.5.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Directory or Hub id of the lemo_config.json to start from."),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="Ranks blocks: pooled, oracle, random, recent or window.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens a block.")] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Each layer chooses blocks of its own.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Draw what your model needs of your text, and what LeMo would keep of it."""
    if output is None and not as_json:
        raise ValueError("give --output DIR for the pictures, or --json for the numbers, or both.")
    if not text.is_file():
        raise FileNotFoundError(f"--text {text}: there is no such file.")
    start = LeMoConfig() if config is None else LeMoConfig.from_pretrained(config)
    given = {"retention": retention, "policy": policy, "block_size": block_size}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if retention is not None:
        changes["threshold"] = None
    if policy is not None:
        changes |= {"predictor": None, "predictor_revision": None}
    if per_layer:
        changes["agree_across_layers"] = False
    lemo_config = dataclasses.replace(start, **changes)
    if output is not None:
        from lemo_hf.inspection_plots import save_figures
    from lemo_hf.inspection import SMALL, inspect_text

    lm, tokenizer = model.load(tokens or 8192)
    ids = tokenizer(text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    if tokens is not None and len(ids) < tokens:
        raise ValueError(f"--tokens {tokens}: {text} has {len(ids)}.")
    found = inspect_text(lm, ids[: tokens or 8192], lemo_config, progress=not as_json)
    wrote = [] if output is None else save_figures(found, output)
    if as_json:
        what = {"model": model.model, "adapter": model.adapter, "text": str(text)}
        print(json.dumps({**what, **found.to_dict()}))
        return
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
    for path in wrote:
        print(f"Wrote {path}")
