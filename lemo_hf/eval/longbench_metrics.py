"""LongBench's nine metrics, equal to those of its own scorer, which made the published numbers.

They have its definitions and oddities (`classification`, `rouge`), since scores by others do not
compare. There is one difference: its ROUGE-L recurses, so a sentence of about a thousand words
exceeds Python's recursion limit and scores 0. Here such a pair gets its score.
"""

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lemo_hf.shown import shown

_PUNCTUATION = frozenset(string.punctuation)
# Code points of Chinese punctuation as the benchmark has it; 《, 〈, 〉 and ． are not among them.
_CHINESE_RANGES = (
    (0x2013, 0x2014),
    (0x2018, 0x2019),
    (0x201B, 0x201F),
    (0x2026, 0x2027),
    (0x3001, 0x3003),
    (0x300B, 0x3011),
    (0x3014, 0x301F),
    (0x3030, 0x3030),
    (0x303E, 0x303F),
    (0xFE4F, 0xFE4F),
    (0xFF01, 0xFF0D),
    (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20),
    (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF64),
)
_CHINESE_PUNCTUATION = _PUNCTUATION.union(
    *(map(chr, range(first, last + 1)) for first, last in _CHINESE_RANGES)
)


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words in common, lower case, without punctuation and articles."""
    return _f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str) -> float:
    """F1 of the words in common as jieba cuts them, lower case, without punctuation.

    Raises:
        ImportError: jieba is not installed.
    """
    return _f1(_chinese_words(prediction), _chinese_words(answer))


def rouge(prediction: str, answer: str) -> float:
    """F score of ROUGE-L, as the package ``rouge`` 1.0.1 defines it by default.

    This is not the usual ROUGE-L: both texts are cut at full stops, and each sentence of the answer
    is compared with each of the prediction. The distinct words in the union of these longest common
    subsequences count, relative to the distinct words of each text.
    """
    predicted, expected = _sentences(prediction), _sentences(answer)
    if not predicted or not expected:
        return 0.0
    common = set()
    for sentence in expected:
        for other in predicted:
            common |= _common_words(sentence, other)
    precision = len(common) / len(set().union(*predicted))
    recall = len(common) / len(set().union(*expected))
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def rouge_zh(prediction: str, answer: str) -> float:
    """`rouge` of the words that jieba cuts; a Chinese full stop ends no sentence.

    Raises:
        ImportError: jieba is not installed.
    """
    return rouge(" ".join(_cut(prediction)), " ".join(_cut(answer)))


def classification(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
    """One over the number of classes named in the prediction, if the answer is among them.

    Classes whose name is a part of the answer's do not count.

    Raises:
        ValueError: There are no classes.
    """
    if not all_classes:
        raise ValueError("classification needs the names of all classes: all_classes is empty.")
    named = [name for name in all_classes if name in prediction]
    # The list shrinks while it is walked, as in the benchmark: the class that follows a removed
    # one is not looked at.
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1.0 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that equal the N of the answer's ``Paragraph N``."""
    return count(prediction, _number_after("Paragraph ", answer))


def retrieval_zh(prediction: str, answer: str) -> float:
    """`retrieval` with ``段落N``."""
    return count(prediction, _number_after("段落", answer))


def count(prediction: str, answer: str) -> float:
    """Share of the prediction's numbers that are the answer, digit by digit."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def code_sim(prediction: str, answer: str) -> float:
    """Similarity of the first line that is no comment and no code fence, in whole percent.

    It is fuzzywuzzy's ratio without python-Levenshtein, which is difflib's.
    """
    lines = prediction.lstrip("\n").split("\n")
    code = (line for line in lines if not any(mark in line for mark in ("`", "#", "//")))
    line = next(code, "")
    if line == answer:
        return 1.0
    if not line or not answer:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


METRICS: dict[str, Callable[..., float]] = {
    metric.__name__: metric
    for metric in (
        qa_f1,
        qa_f1_zh,
        rouge,
        rouge_zh,
        classification,
        retrieval,
        retrieval_zh,
        count,
        code_sim,
    )
}
CHINESE_METRICS = frozenset({"qa_f1_zh", "rouge_zh"})  # need jieba


def load_jieba() -> Any:
    """The package that cuts Chinese texts into words.

    Raises:
        ImportError: jieba is not installed.
    """
    try:
        import jieba
    except ImportError as error:
        raise ImportError(
            "scoring Chinese texts needs the package jieba, which cuts them into words: "
            'pip install "lemo-hf[zh]".'
        ) from error
    jieba.setLogLevel("WARNING")  # else it reports on stderr that it loads its dictionary
    return jieba


def _words(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower() if letter not in _PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _chinese_words(text: str) -> list[str]:
    words = []
    for word in _cut(text):
        kept = "".join(letter for letter in word.lower() if letter not in _CHINESE_PUNCTUATION)
        words.append("".join(kept.split()))
    return [word for word in words if word]


def _cut(text: str) -> list[str]:
    return list(load_jieba().cut(text, cut_all=False))


def _f1(predicted: list[str], expected: list[str]) -> float:
    common = (Counter(predicted) & Counter(expected)).total()
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return (2 * precision * recall) / (precision + recall)


def _sentences(text: str) -> list[list[str]]:
    """Words of each sentence; a sentence of white space alone has one word, the empty one."""
    return [part.split() or [""] for part in text.split(".") if part]


def _common_words(expected: Sequence[str], predicted: Sequence[str]) -> set[str]:
    """Words of one longest common subsequence; which of several it is decides the score."""
    lengths = [[0] * (len(predicted) + 1)]
    for word in expected:
        above, row = lengths[-1], [0]
        for j, other in enumerate(predicted):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    common, i, j = set(), len(expected), len(predicted)
    while i and j:
        if expected[i - 1] == predicted[j - 1]:
            i, j = i - 1, j - 1
            common.add(expected[i])
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return common


def _number_after(word: str, answer: str) -> str:
    match = re.search(rf"{word}(\d+)", answer)
    if match is None:
        raise ValueError(f"the answer {shown(answer)} names no {word.strip()} and its number.")
    return match[1]
