"""What a model makes of the questions about needles."""

import json

import pytest
import torch
from support.models import make_model, with_lora
from support.needle_questions import questions
from support.needle_rows import make
from support.paths import DEMO
from support.processes import launch
from transformers import AutoModelForCausalLM

from lemo_hf import LeMoConfig, apply_lemo
from lemo_hf.core.families import FAMILIES
from lemo_hf.eval.needles import (
    NeedleRow,
)
from lemo_hf.eval.retrieval import MEASURES, Retrieval, retrieval


def greedy(model, row):
    """What the model generates from the prompt, as many tokens as the answer has."""
    prompt = torch.tensor([row.prompt_ids])
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=row.answer_tokens,
        min_new_tokens=row.answer_tokens,
        do_sample=False,
    )
    return out[0, prompt.shape[1] :].tolist()


def no_special_tokens(model):
    """Special tokens end a generation, or are what generation may not choose."""
    with torch.no_grad():
        model.get_output_embeddings().weight[:3] = 0
    return model


def reference(model, rows):
    """The measures of each row, from all logits of one pass a row."""
    measures = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids]), use_cache=False).logits[0].double()
        first = len(row.input_ids) - row.answer_tokens
        nats, right = 0.0, 0
        for place in range(first, len(row.input_ids)):
            row_logits = logits[place - 1]
            nats += float(row_logits[row.input_ids[place]] - row_logits.logsumexp(0))
            right += int(row_logits.argmax()) == row.input_ids[place]
        measures.append((right == row.answer_tokens, right, nats))
    return measures


def check(result, rows, measures):
    cells = {(len(row.input_ids), row.depth) for row in rows}
    assert {(cell["length"], cell["depth"]) for cell in result.cells} == cells
    for cell in result.cells:
        mine = [
            (row.answer_tokens, *measure)
            for row, measure in zip(rows, measures, strict=True)
            if (len(row.input_ids), row.depth) == (cell["length"], cell["depth"])
        ]
        tokens, right, right_tokens, nats = map(sum, zip(*mine, strict=True))
        assert cell["samples"] == len(mine)
        assert cell["accuracy"] == right / len(mine)
        assert cell["token_accuracy"] == right_tokens / tokens
        assert cell["log_probability"] == pytest.approx(nats / len(mine), rel=1e-5)


def test_an_answer_is_right_exactly_if_greedy_generation_gives_it():
    model = no_special_tokens(make_model("llama")).eval()
    rows = questions(model, 12)
    generated = [greedy(model, row) == row.answer_ids for row in rows]
    assert 2 < sum(generated) < 10  # both occur
    for batch_size in (1, 4):
        result = retrieval(model, rows, batch_size=batch_size, progress=False)
        measures = reference(model, rows)
        check(result, rows, [(g, *m[1:]) for g, m in zip(generated, measures, strict=True)])


def test_every_single_row_agrees_with_generation(books, tokenizer):
    """On real text and a trained model: which tokens are right, and so which answers."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype="float32").eval()
    for row in make(books, tokenizer, lengths=[200], depths=[1.0], samples=2):
        choice = greedy(model, row)
        asked = NeedleRow(row.prompt_ids + choice, len(choice), 1.0, 0, "", "")
        assert retrieval(model, [asked], progress=False).mean() == 1
        (cell,) = retrieval(model, [row], progress=False).cells
        assert cell["accuracy"] == (choice == row.answer_ids)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_families(model_type):
    model = make_model(model_type)
    rows = questions(model.eval(), 5)
    result = retrieval(model, rows, batch_size=3, progress=False)
    check(result, rows, reference(model, rows))


@pytest.mark.parametrize(
    "wrap", [with_lora, lambda m: apply_lemo(m, LeMoConfig(block_size=8)) and m]
)
def test_peft_and_lemo(wrap):
    model = wrap(make_model("llama"))
    rows = questions(model.eval(), 5)
    model.train()
    check(retrieval(model, rows, progress=False), rows, reference(model.eval(), rows))


def test_the_model_is_given_back_and_only_answers_have_logits():
    model = make_model("llama", attention_dropout=0.5)
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    rows = questions(model, 7)
    shapes = []
    model.lm_head.register_forward_hook(lambda _, args, out: shapes.append(tuple(out.shape)))
    first = retrieval(model, rows, batch_size=2, progress=False)
    assert shapes == [(2, 4, 97), (2, 3, 97), (2, 3, 97), (1, 4, 97)]
    assert retrieval(model, rows, batch_size=2, progress=False) == first  # no dropout
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_and_rows_that_cannot_be():
    model = make_model("llama")
    with pytest.raises(ValueError, match="there is no row to answer"):
        retrieval(model, [])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        retrieval(model, questions(model, 1), batch_size=0)
    with pytest.raises(ValueError, match="LlamaModel does not take logits_to_keep"):
        retrieval(model.model, questions(model, 1))


def made_up():
    cells = [
        {"length": length, "depth": depth, "samples": 4, "accuracy": accuracy}
        | {"token_accuracy": 0.9, "log_probability": -1.5}
        for length, depth, accuracy in [(1024, 0.0, 1.0), (1024, 0.5, 0.25), (4096, 0.5, 0.5)]
    ]
    return Retrieval(cells)


def test_the_table_and_json():
    result = made_up()
    assert result.format_table().splitlines() == [
        "answers right, by depth and by length in tokens (4 rows each)",
        "depth  1,024  4,096  mean",
        " 0.00   1.00         1.00",
        " 0.50   0.25   0.50  0.38",
        " mean   0.62   0.50  0.58",
    ]
    assert "-1.50" in result.format_table("log_probability")
    assert result.grid() == [[1.0, None], [0.25, 0.5]]
    values = json.loads(json.dumps(result.to_dict()))
    assert Retrieval.from_dict(values) == result
    assert values["accuracy"] == pytest.approx(1.75 / 3) and set(MEASURES) < set(values)


PROCESS = """
import json
from accelerate import PartialState
state = PartialState(cpu=True)
from support.models import make_model
from support.needle_questions import questions
from lemo_hf.eval.retrieval import retrieval
model = make_model("llama").eval()
rows = questions(model)
passes = []
model.register_forward_hook(lambda *_: passes.append(1))
result = retrieval(model, rows, batch_size=3, progress=False).to_dict()
with open(f"{sys.argv[1]}/{state.process_index}.json", "w") as file:
    json.dump([result, len(passes)], file)
"""


@pytest.mark.soak
def test_two_processes_share_the_rows_and_get_the_same_result(tmp_path):
    launch(PROCESS, tmp_path, processes=[2])
    (first, passes), (second, other_passes) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)
    )
    model = make_model("llama").eval()
    alone = retrieval(model, questions(model), batch_size=3, progress=False).to_dict()
    assert first == second and passes == other_passes == 2  # three batches, and one again
    for cell, expected in zip(first["cells"], alone["cells"], strict=True):
        assert cell == pytest.approx(expected)
