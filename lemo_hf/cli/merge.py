"""`lemo merge`."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from lemo_hf.cli.options import AsJson, DType, TrustRemoteCode, path_option, prepared_config
from lemo_hf.shown import shortened
from lemo_hf.storage.outputs import check_output


def merge(
    adapter: Annotated[str, typer.Option(help="PEFT adapter: Hub id or directory.")],
    output: Annotated[
        Path,
        path_option(help="Directory for the merged model."),
    ],
    model: Annotated[
        str | None, typer.Option(help="Base model; default: the one that the adapter names.")
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(
            help="Dtype of the merged weights; default: that of the base model in training."
        ),
    ] = None,
    push: Annotated[str | None, typer.Option(help="Repository to upload the result to.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Add an adapter into its base model, and save a plain model that needs no PEFT.

    An adapter of lemo train has its settings beside it (lemo_train.yaml): stretched positions stay
    stretched. The merged model is compared with the adapted model before it is written to --output.
    """
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise ImportError('lemo merge needs peft: pip install "lemo-hf[peft]".') from error
    if output.is_dir() and any(output.iterdir()):
        raise ValueError(f"--output {output} is not empty: give another directory.")
    check_output(output, "--output", directory=True)
    import dataclasses

    from transformers import AutoModelForCausalLM

    from lemo_hf.cli.adapter import check_adapter, load_adapter
    from lemo_hf.cli.merging import difference, logits, merged, probe
    from lemo_hf.cli.train_model import load_base

    check_adapter(adapter)
    section, tokens = _trained(adapter, PeftConfig.from_pretrained(adapter), model)
    changes: dict[str, Any] = {"name": model or section.name}
    changes |= {"trust_remote_code": trust_remote_code, "attn_implementation": None}
    if dtype is not None:
        changes["dtype"] = dtype.value
    if model not in (None, section.name):
        changes["revision"] = None
    section = dataclasses.replace(section, **changes)
    try:
        _check_weights(section)
    except OSError as error:
        if model is not None:
            raise
        raise OSError(
            f"{adapter} names its base model {section.name!r}, which is not here: give it by "
            f"--model ({shortened(' '.join(str(error).split()))})."
        ) from error
    trust = {"trust_remote_code": trust_remote_code}
    lm, tokenizer = load_base(section, tokens)
    tuned, tokenizer = load_adapter(lm, adapter, tokenizer, **trust)
    ids = probe(tuned)
    expected = logits(tuned, ids)
    plain = merged(tuned, progress=not as_json)
    with whole_folder(output) as folder:
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del lm, tuned, plain  # one model in memory at a time: what is compared is what is loaded
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **trust)
        found = difference(logits(loaded, ids), expected, loaded, f"{adapter} in {section.name}")
    url = None
    if push is not None:
        loaded.add_model_tags(["lemo-hf"])
        with _said_what_is_whole(output, push):
            url = str(loaded.push_to_hub(push))
            tokenizer.push_to_hub(push)
    result = {"output": str(output), "base": section.name, "adapter": adapter, "pushed": url}
    if as_json:
        print(json.dumps({**result, "difference": found}))
        return
    print(f"Wrote {output}: {adapter} merged into {section.name}")
    print(f"Its logits are the adapted model's, up to {found:.1g} of the largest.")
    if url is not None:
        print(url)


@contextmanager
def _said_what_is_whole(output: Path, repository: str) -> Iterator[None]:
    """Within this context an upload's error says that the merged model is written, and how it is
    uploaded later."""
    try:
        yield
    except Exception as error:  # of the Hub's client: httpx's errors share no base class with ours
        why = shortened(" ".join(str(error).split())) or type(error).__name__
        raise OSError(
            f"{output} holds the whole merged model, and it was not uploaded to {repository} "
            f"({why.rstrip('.')}). Upload it later: hf upload {repository} {output}"
        ) from error


def _check_weights(section: Any) -> None:
    """Raises ValueError for a base model with quantised weights, which merging would round
    again."""
    shared = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    config = prepared_config(section.name, **shared)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{section.name} has quantised weights, which would round what the adapter adds: give "
            "--model, the unquantised model that it was made from."
        )


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write to; its files are moved to ``output`` if all went well, else removed."""
    fresh = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".merging-", dir=output) as part:
            yield Path(part)
            # Without its config, which comes last, nothing loads the rest.
            for path in sorted(Path(part).iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, output / path.name)
    except BaseException:
        if fresh:
            output.rmdir()
        raise


def _trained(adapter: str, config: Any, model: str | None) -> tuple[Any, int | None]:
    """How `lemo train` loaded the base model, and the tokens of its rows."""
    from lemo_hf.cli.adapter import settings_of
    from lemo_hf.cli.train_config import ModelSection

    settings = settings_of(adapter)
    if settings is not None:
        return settings.model(), settings.data().tokens
    base = config.base_model_name_or_path or model
    if base is None:
        raise ValueError(f"{adapter} names no base model: give --model.")
    return ModelSection(base, revision=config.revision), None
