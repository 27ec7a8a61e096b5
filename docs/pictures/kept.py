"""Draw kept.png, what each policy keeps of a real text and of a real question about it.

    python docs/pictures/kept.py

Text and model are the demo's: 16,384 tokens of "Oh, Money! Money!" (public domain, see
examples/demo/text/SOURCES.md) and a model of 2M parameters whose positions are stretched to that
length, as `lemo inspect --rope-type linear` does. The model decides the row "pooled" alone.
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf import LeMoConfig
from lemo_hf.cli.options import prepared_config
from lemo_hf.eval.plots import save_figure
from lemo_hf.inspection.kept import compare_policies
from lemo_hf.inspection.kept_plots import policies_figure
from lemo_hf.inspection.row import text_row

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent.parent / "examples" / "demo"
TOKENS = 16384
QUESTION = "Where do people in Hillerton go boating in summer and skating in winter?"
ANSWER = "On the tiny pond of the common."
NEEDLE = "a tiny pond that accommodated a few boats in summer and a limited number of skaters"


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    config = prepared_config(
        str(DEMO / "model"),
        rope_type="linear",
        rope_parameters=None,
        max_position_embeddings=None,
        length=TOKENS,
    )
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", config=config, dtype="float32")
    text = (DEMO / "text" / "heldout-oh-money-money.txt").read_text(encoding="utf-8")
    settings = LeMoConfig(retention=0.3)
    row = text_row(tokenizer, text, TOKENS)
    policies = [*["chunks"] * 3, "recent", "window"]
    whole = compare_policies(model, tokenizer, row, settings, policies)
    row = text_row(tokenizer, text, TOKENS, QUESTION, ANSWER, [NEEDLE])
    policies = ["overlap", "pooled", "random", "recent"]
    asked = compare_policies(model, tokenizer, row, settings, policies)
    print(whole.to_text(), asked.to_text(), sep="\n")
    save_figure(policies_figure(whole, asked), HERE / "kept.png")


if __name__ == "__main__":
    main()
