"""Needles in real text: where they stand, and rows to train on."""

import numpy as np
import pytest
import torch
from support.needle_rows import DEPTHS, NEEDLE, QUESTION, make
from support.paths import DEMO
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_hf.eval.needle_text import SENTENCE_END, _ends
from lemo_hf.eval.needles import NeedleTemplate, mix_retrieval
from lemo_hf.eval.retrieval import retrieval
from lemo_hf.storage.text_rows import token_rows


def without_needle(row, tokenizer, question=QUESTION):
    """The haystack's tokens, and how many of them come before the needle."""
    line = tokenizer(f"\n{NEEDLE.format(row.key, row.value)}\n")["input_ids"]
    tail = tokenizer("\n" + question.format(row.key, row.value))["input_ids"]
    ids, end = row.input_ids, row.position + len(line)
    assert ids[row.position : end] == line and ids[-len(tail) :] == tail
    return ids[: row.position] + ids[end : -len(tail)], row.position


def test_rows_are_real_text_with_a_line_at_its_depth(books, tokenizer):
    rows = make(books, tokenizer)
    lengths = [len(row.input_ids) for row in rows]
    assert lengths == [300] * 8 + [1000] * 8
    assert [row.depth for row in rows] == [depth for depth in DEPTHS for _ in range(2)] * 2
    for i, row in enumerate(rows):
        haystack, before = without_needle(row, tokenizer)
        text = tokenizer.decode(haystack)
        assert text in books[i % 2]  # one piece of one document, documents in turn
        # Sentences of these books have 25 tokens in the mean, hardly one has more than 160.
        assert abs(before - row.depth * len(haystack)) < 80
        head = tokenizer.decode(haystack[:before])
        assert not before or head.rstrip().endswith((".", "!", "?", '"', "'", "I")), head[-30:]
        assert text.rstrip().endswith((".", "!", "?", '"', "'", "I")), text[-30:]
        assert row.depth > 0 or before == 0
        assert row.depth < 1 or before == len(haystack)


def test_the_answer_is_the_value(books, tokenizer):
    for row in make(books, tokenizer, template=NeedleTemplate(digits=9), keys=3):
        # The space before a number may be a token of the prompt, or be part of the answer's first.
        assert tokenizer.decode(row.answer_ids).strip() == row.value and len(row.value) == 9
        assert row.answer_tokens == len(row.answer_ids) > 1
        assert row.prompt_ids + row.answer_ids == row.input_ids
        assert tokenizer.decode(row.prompt_ids).rstrip(" ").endswith(f"for {row.key} is:")


def test_distractors(books, tokenizer):
    places = []
    for row in make(books, tokenizer, keys=4, lengths=[1000]):
        text = tokenizer.decode(row.input_ids)
        lines = [line for line in text.splitlines() if line.startswith("The special magic")]
        words = [line.removesuffix(".").split() for line in lines]
        assert len({line[5] for line in words}) == len({line[-1] for line in words}) == 4
        asked = NEEDLE.format(row.key, row.value)
        assert tokenizer.decode(row.input_ids[row.position :]).startswith(f"\n{asked}\n")
        places.append(lines.index(asked))
    assert places[:2] == [0, 0] and places[-2:] == [3, 3] and len(set(places)) > 2


def test_rows_depend_on_the_seed_and_on_nothing_else(books, tokenizer):
    rows = make(books, tokenizer, keys=2)
    assert make(books, tokenizer, keys=2) == rows
    assert make(books, tokenizer, keys=2, lengths=[300], depths=[0.5])[0] == rows[4]
    others = make(books, tokenizer, keys=2, seed=1)
    assert all(a.input_ids != b.input_ids for a, b in zip(rows, others, strict=True))
    assert len({row.value for row in rows}) == len(rows)
    # Depths are compared on one haystack: its end, where the question follows, is the same.
    haystacks = [without_needle(row, tokenizer)[0] for row in make(books, tokenizer)[8::2]]
    assert len({tuple(haystack[-900:]) for haystack in haystacks}) == 1


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("Mr. A. Smith paid $3.50 to Mrs. Lee. She said “no!” Then he left?\n\nYes. " * 40, ".”?."),
        ("def f(x):\n    return x.y(x)\n" * 80, ":)"),
        ("价格是三元。他走了！她问：“为什么？”他没说。" * 60, "。！？”"),
        ("word " * 900, "d "),
    ],
)
def test_where_needles_stand(text, ends, tokenizer):
    depths = [i / 40 for i in range(4, 40)]
    for row in make([text], tokenizer, lengths=[400], depths=depths, samples=1):
        haystack, before = without_needle(row, tokenizer)
        head = tokenizer.decode(haystack[:before])
        assert head.rstrip(" \n")[-1] in ends, head[-20:]
        assert not head.rstrip().endswith(("Mr.", "A.", "Mrs.", "3."))
        assert abs(before - row.depth * len(haystack)) < 25


def test_a_token_that_goes_on_into_the_next_sentence_is_not_split():
    tokens = ["One", " two. T", "hree.", "\n", "\nFour. ", "Five"]
    ends = np.cumsum([len(token) for token in tokens])
    assert _ends(SENTENCE_END, "".join(tokens), ends).tolist() == [4, 5]


def test_the_tokenizers_beginning_and_other_words(books, tokenizer):
    bos = AutoTokenizer.from_pretrained(DEMO / "model", bos_token="</s>")
    from tokenizers.processors import TemplateProcessing

    bos._tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", bos.bos_token_id)]
    )
    template = NeedleTemplate(
        needle="{key} = {value};",
        question="Now recall. {key} = {value}",
        introduction="Read {this}.",
    )
    for row in make(books, bos, template=template):
        assert row.input_ids[0] == bos.bos_token_id and len(row.input_ids) in (300, 1000)
        text = bos.decode(row.input_ids[1:])
        assert text.startswith("Read {this}.") and f"\n{row.key} = {row.value};\n" in text
        assert text.endswith(f"\nNow recall. {row.key} = {row.value}")
        assert row.depth > 0 or text.startswith(f"Read {{this}}.\n{row.key}")
    (row,) = mix_retrieval(books, bos, 200, share=1, template=template, max_rows=1, progress=False)
    assert row["input_ids"][0] == bos.bos_token_id and len(row["input_ids"]) == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": [60]}, r"60 tokens are too few: 1 key lines, question and answer alone take"),
        ({"lengths": [200], "keys": 9}, r"200 tokens are too few: 9 key lines.*or fewer keys"),
        ({"lengths": [300, 20000]}, r"no document has 20000 tokens: the longest has \d+\."),
        ({"depths": [0.5, 1.2]}, r"a depth is a share of the haystack.*got 1\.2"),
        ({"depths": [-0.1]}, r"got -0\.1"),
        ({"depths": []}, "lengths and depths must not be empty"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"keys": 0}, "keys must be at least 1, got 0"),
        ({"keys": 5000}, r"keys=5,000 is too many: there are 1,600"),
    ],
)
def test_rows_that_cannot_be(options, message, books, tokenizer):
    with pytest.raises(ValueError, match=message):
        make(books, tokenizer, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"needle": "the number is {value}"}, "needle must contain {key}"),
        ({"question": "and {key}?"}, "question must contain {value}"),
        ({"question": "{value} is for {key}"}, "question must end with {value}"),
        ({"question": "not {value}: {key}: {value}"}, "question must end with {value}"),
        ({"digits": 3}, "digits must be at least 4, got 3"),
    ],
)
def test_templates_that_cannot_be(words, message):
    with pytest.raises(ValueError, match=message):
        NeedleTemplate(**words)


def test_tokenizers_that_cannot_be(books):
    with pytest.raises(ValueError, match="object gives no places of tokens in the text"):
        make(books, object())


def check_training_rows(rows, tokenizer, books, **options):
    expected = {"keys": 4, "questions": 1, "answer_only": False, **options}
    mixed = 0
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        text = tokenizer.decode(ids)
        assert len(ids) == len(labels) == 256
        lines = [line for line in text.splitlines() if line.startswith("The special magic")]
        if not lines:
            assert labels == ids and text in "".join(books)
            continue
        mixed += 1
        assert len(lines) == expected["keys"]
        values = {line.split()[5]: line.removesuffix(".").split()[-1] for line in lines}
        asked = text.splitlines()[-expected["questions"] :]
        answers = []
        for question in asked:
            key, value = question.split("?")[0].split()[-1], question.split()[-1]
            assert question == QUESTION.format(key, value) and values[key] == value
            answers.append(value)
        assert len(set(answers)) == expected["questions"]
        if expected["answer_only"]:
            kept = [label for label in labels if label != -100]
            assert tokenizer.decode(kept).replace(" ", "") == "".join(answers)
            assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        else:
            assert labels == ids
    return mixed / len(rows)


def test_training_rows(books, tokenizer):
    def mix(**options):
        return mix_retrieval(books, tokenizer, 256, progress=False, **options)

    share = check_training_rows(mix(), tokenizer, books)
    assert 0.3 < share < 0.7
    asked = {"questions": 3, "keys": 3, "answer_only": True}
    assert check_training_rows(mix(share=1, **asked), tokenizer, books, **asked) == 1
    assert mix() == mix() and mix() != mix(seed=1)
    assert mix(max_rows=3) == mix()[:3]
    assert mix(share=0) == token_rows(books, tokenizer, 256, progress=False)


def test_training_rows_use_the_text_once(books, tokenizer):
    rows = mix_retrieval(books[:1], tokenizer, 256, share=1, keys=1, progress=False)
    texts = [tokenizer.decode(row["input_ids"]).splitlines() for row in rows]
    haystack = "".join(line for lines in texts for line in lines if "special magic" not in line)
    haystack, book = ("".join(text.split()) for text in (haystack, books[0]))
    assert book.startswith(haystack) and len(haystack) > 0.95 * len(book)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, "share must be between 0 and 1, got 1.5"),
        ({"questions": 5}, "5 questions about 4 keys: set keys=5 or more"),
        ({"questions": 0}, "questions must be at least 1"),
        ({"max_rows": 0}, "max_rows must be at least 1, got 0"),
        ({"tokens": 100}, "100 tokens are too few: 4 key lines"),
        ({"tokens": 20000}, "no document has 20000 tokens: the longest has"),
    ],
)
def test_training_rows_that_cannot_be(options, message, books, tokenizer):
    settings = {"tokens": 256, "share": 1, "progress": False, **options}
    with pytest.raises(ValueError, match=message):
        mix_retrieval(books, tokenizer, **settings)


def test_training_on_such_rows_makes_answers_more_probable(books, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype="float32")
    asked = make(books[1:], tokenizer, lengths=[128], depths=[0.5], samples=4)
    before = retrieval(model, asked, batch_size=4, progress=False)
    rows = mix_retrieval(
        books[:1], tokenizer, 128, share=1, keys=1, answer_only=True, max_rows=48, progress=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for start in range(0, 48, 8):
        batch = rows[start : start + 8]
        batch = {name: torch.tensor([row[name] for row in batch]) for name in batch[0]}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = retrieval(model, asked, batch_size=4, progress=False)
    assert after.mean("log_probability") > before.mean("log_probability") + 5
