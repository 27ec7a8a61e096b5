"""LongBench's scores through the library evaluate."""

import evaluate
import pytest

from lemo_hf.eval.longbench_score import score_rows
from lemo_hf.eval.metric import LongBenchMetric


@pytest.mark.parametrize(
    ("task", "classes"), [("hotpotqa", None), ("gov_report", None), ("trec", ["city", "person"])]
)
def test_the_metric_is_the_scorer(task, classes):
    predictions = ["a city\nand more", "The old person of Rome. It rained.", "nothing"]
    answers = [["city"], ["person", "an old person of Rome"], ["something. city"]]
    rows = [
        {"pred": prediction, "answers": answer, "all_classes": classes}
        for prediction, answer in zip(predictions, answers, strict=True)
    ]
    metric = LongBenchMetric(task)
    extra = {} if classes is None else {"all_classes": classes}
    found = metric.compute(predictions=predictions, references=answers, **extra)
    assert found == {"score": score_rows(task, rows)} and found["score"] > 10
    for prediction, answer in zip(predictions, answers, strict=True):  # row by row, as loops do
        metric.add(predictions=prediction, references=answer)
    assert metric.compute(**extra) == found
    assert isinstance(metric, evaluate.Metric)


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="hotpot"):
        LongBenchMetric("hotpot")
