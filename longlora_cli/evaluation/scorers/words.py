"""Words of an answer: normalisation and bag-of-words F1, the arithmetic that question answering scorers share."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from longlora_cli.evaluation.scorers.base import needed_package

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Full-width and Chinese punctuation as LongBench and InfiniteBench list it.
CHINESE_PUNCTUATION = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃"
CHINESE_PUNCTUATION += "》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
_NO_CHINESE_PUNCTUATION = str.maketrans("", "", string.punctuation + CHINESE_PUNCTUATION)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without articles, blanks collapsed - in this order.

    The order matters: `U.S.A.` becomes `usa`, and `a-b` becomes `ab` before articles are looked for. Source: the SQuAD
    v1.1 evaluation (Rajpurkar et al. 2016), as LongBench applies it (`metrics.py` at 2e00731).
    """
    return without_articles(without_punctuation(text.lower()))


def without_punctuation(text: str) -> str:
    """`text` less ASCII punctuation; curly quotes and dashes stay."""
    return text.translate(_NO_PUNCTUATION)


def without_articles(text: str) -> str:
    """`text` less the words a, an, the, with blanks collapsed."""
    return " ".join(_ARTICLES.sub(" ", text).split())


def normalize_chinese(text: str, kept: str = "") -> str:
    """Lower case, without punctuation and without blanks; `kept` names punctuation that stays."""
    table = {code: value for code, value in _NO_CHINESE_PUNCTUATION.items() if chr(code) not in kept}
    return "".join(text.lower().translate(table).split())


def bag_f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of two bags, 0 to 1; nothing in common, also where both are empty, gives 0."""
    common = sum((Counter(said) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(said), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def word_f1(prediction: str, reference: str) -> float:
    """Bag-of-words F1 of the normalised words, 0 to 1; two texts without a word give 0. Source: as above."""
    return bag_f1(normalize_answer(prediction).split(), normalize_answer(reference).split())


def chinese_words(text: str) -> list[str]:
    """The words that jieba 0.42.1 finds, in its exact mode with its own dictionary.

    Raises:
        SettingsError: jieba is not installed.
    """
    return list(_segmenter().cut(text, cut_all=False))


@cache
def _segmenter() -> Any:
    segmenter = needed_package("jieba").Tokenizer()
    # Left alone it would read its dictionary from jieba.cache in the shared folder for temporary files, by marshal,
    # whoever wrote it, and log to standard error. Reading the dictionary itself takes 0.6 s.
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter
