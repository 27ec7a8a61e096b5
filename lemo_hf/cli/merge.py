"""`lemo merge`."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo_hf.cli.options import AsJson, DType, TrustRemoteCode


def merge(
    adapter: Annotated[str, typer.Option(help="PEFT adapter: Hub id or directory.")],
    output: Annotated[Path, typer.Option(help="Directory for the merged model.")],
    model: Annotated[
        str | None, typer.Option(help="Base model; default: the one that the adapter names.")
    ] = None,
    dtype: Annotated[
        DType | None, typer.Option(help="Of the merged weights; default: as the base was trained.")
    ] = None,
    push: Annotated[str | None, typer.Option(help="Repository to upload the result to.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Add an adapter into its base model, and save it as a plain model that needs no PEFT.

    An adapter of lemo train brings its settings (lemo_train.yaml): positions that were stretched
    stay stretched.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ImportError('lemo merge needs peft: pip install "lemo-hf[peft]".') from error
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {output} is not empty: give another directory.")
    import dataclasses

    from transformers import AutoTokenizer

    from lemo_hf.cli.train_model import load_base

    base = PeftConfig.from_pretrained(adapter).base_model_name_or_path
    section, tokens = _trained(adapter, model or base)
    changes: dict[str, Any] = {"name": model or section.name}
    changes["trust_remote_code"] = trust_remote_code
    if dtype is not None:
        changes["dtype"] = dtype.value
    if model not in (None, section.name):
        changes["revision"] = None
    lm, tokenizer = load_base(dataclasses.replace(section, **changes), tokens)
    merged = PeftModel.from_pretrained(lm, adapter).merge_and_unload(
        progressbar=not as_json, safe_merge=True
    )
    if Path(adapter, "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(adapter)
    merged.add_model_tags(["lemo-hf"])
    merged.save_pretrained(output)
    tokenizer.save_pretrained(output)
    url = None
    if push is not None:
        url = str(merged.push_to_hub(push))
        tokenizer.push_to_hub(push)
    result = {"output": str(output), "base": changes["name"], "adapter": adapter, "pushed": url}
    if as_json:
        print(json.dumps(result))
        return
    print(f"Wrote {output}: {adapter} merged into {changes['name']}")
    if url is not None:
        print(url)


def _trained(adapter: str, base: str | None) -> tuple[Any, int | None]:
    """How `lemo train` loaded the base model, and for rows of how many tokens."""
    from lemo_hf.cli.train_config import ModelSection
    from lemo_hf.cli.train_settings import FILE_NAME, read_settings
    from lemo_hf.files import EntryNotFound, download

    path: Path | None = Path(adapter, FILE_NAME)
    if not Path(adapter).is_dir():
        try:
            path = Path(download(adapter, FILE_NAME, "give a directory"))
        except EntryNotFound:
            path = None
    if path is not None and path.is_file():
        settings = read_settings(str(path))
        return settings.model(), settings.data().tokens
    if base is None:
        raise ValueError(f"{adapter} names no base model: give --model.")
    return ModelSection(base), None
