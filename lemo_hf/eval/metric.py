"""LongBench's scores as an `evaluate.Metric`."""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from lemo_hf.eval.longbench_score import score_rows
from lemo_hf.eval.longbench_tasks import choose_tasks

_CITATION = "Bai et al., LongBench, arXiv:2308.14508."
_INPUTS = """
predictions: texts. references: of each, the list of answers that are right. all_classes, an
argument of compute(): names of the classes, for trec and lsht.
"""


class LongBenchMetric(evaluate.Metric):
    """The score of one task, mean over rows, in percent with two decimals.

    ``LongBenchMetric("hotpotqa").compute(predictions=[...], references=[[...], ...])`` gives
    ``{"score": ...}``.

    Args:
        config_name: Name of a LongBench task.
        **options: Options of `evaluate.Metric` (``cache_dir``, ``num_process``, ...).

    Raises:
        ImportError: The task is Chinese and jieba is not installed (by ``compute``).
        ValueError: There is no such task.
    """

    def __init__(self, config_name: str, **options: Any):
        choose_tasks([config_name])
        super().__init__(config_name=config_name, **options)

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=f"LongBench's score of {self.config_name}.",
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": datasets.List(text)}),
        )

    def _compute(
        self,
        predictions: Sequence[str],
        references: Sequence[Sequence[str]],
        all_classes: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        rows = [
            {"pred": prediction, "answers": list(answers), "all_classes": all_classes}
            for prediction, answers in zip(predictions, references, strict=True)
        ]
        return {"score": score_rows(self.config_name, rows)}
