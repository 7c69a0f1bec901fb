"""lm-evaluation-harness judges our RULER rows as we do."""

from __future__ import annotations

import random

import pytest
import synthetic_parts as parts

from longlora_cli.evaluation.sample_files import ruler_row
from longlora_cli.evaluation.scorers import find_scorer
from longlora_cli.task_names import RULER


@pytest.mark.parametrize("task", RULER)
def test_our_ruler_rows_have_the_same_score_in_lm_eval(task):
    from lm_eval.tasks.ruler.common_utils import process_results

    rng = random.Random(task)
    for sample in parts.samples(task, "embedded", 4096):
        row = ruler_row(parts.tokenizer("embedded"), 0, sample)
        scores = set()
        for _ in range(10):
            said = rng.sample(row["outputs"], rng.randint(0, len(row["outputs"])))
            cased = [output.upper() if rng.random() < 0.3 else output for output in said]
            prediction = rng.choice([" ", "\x01\n", "The "]) + rng.choice([", ", "\n", " and "]).join(cased)
            theirs = process_results(row, [prediction])["4096"]
            ours = find_scorer(row["scorer"]).score(prediction, row["outputs"])["all"] / 100
            assert ours == pytest.approx(theirs, abs=1e-12)
            scores.add(theirs)
        assert len(scores) > 1
