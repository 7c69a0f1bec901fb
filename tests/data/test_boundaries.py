from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from longlora_cli.data.boundaries import Boundaries
from longlora_cli.data.tokenizing import encode_texts

BODY = "The miller slept. The river ran"
BREAKS = {
    "a Markdown heading": ("Text before.\n\n", "## The mill\n\nThe river ran."),
    "a heading without a blank line": ("Text before.\n", "# The mill\nThe river ran."),
    "capitals and Roman": ("Text before.\n\n", "CHAPTER XII\n\nThe river ran."),
    "a full stop": ("Text before.\n\n", "Chapter 3.\nThe river ran."),
    "a title in the line": ("Text before.\n\n\n", "Chapter IV. Of the river, and the mill\n\nThe river ran."),
    "a number word": ("Text before.\n\n", "BOOK THE FIRST\n\nThe river ran."),
    "the number in the next line": ("Text before.\n\n", "Part\nII\n\nThe river ran."),
    "a Roman number alone": ("Text before.\n\n", "XIV\n\nThe river ran."),
    "a form feed": ("Text before.\n\f", "The river ran."),
    "Windows line ends": ("Text before.\r\n\r\n", "CHAPTER 2\r\n\r\nThe river ran."),
}
NO_CHAPTERS = {
    "a wrapped line": "He wrote of it in\nChapter 3 of his book, twice.",
    "a long line": f"Before.\n\nPart I of this is {'long and ' * 20}ends.",
    "a hashtag": "Before.\n\n#river is what they say.",
    "a name without a number": "Before.\n\nChapter houses stood there.\n\n",
    "a word of Roman letters": "Before.\n\nMILL\n\nCIVIL\n\n",
    "a Roman number in a sentence": "Before.\n\nI went to the river.",
}


def boundaries(tokenizer: Any, text: str) -> tuple[Boundaries, np.ndarray]:
    return Boundaries(tokenizer), encode_texts(tokenizer, [text])[0]


@pytest.mark.parametrize("name", BREAKS)
def test_a_chapter_begins_at(name: str, chatml: Any) -> None:
    before, after = BREAKS[name]
    found, ids = boundaries(chatml, before + after)
    place, kind = found.last(ids, 1, len(ids) - 1, "chapter")
    assert kind == "chapter"
    assert chatml.decode(ids[place:-1]).lstrip("\f") == after
    assert chatml.decode(ids[:place]).rstrip("\f") == before.rstrip("\f")


@pytest.mark.parametrize("name", NO_CHAPTERS)
def test_no_chapter_begins_at(name: str, chatml: Any) -> None:
    found, ids = boundaries(chatml, NO_CHAPTERS[name])
    assert found.last(ids, 1, len(ids) - 1, "chapter")[1] != "chapter"


SENTENCES = st.lists(
    st.text("xé漢 ", min_size=1, max_size=12).map(lambda t: f"x{t}."), min_size=1, max_size=4
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    paragraphs=st.lists(SENTENCES, min_size=2, max_size=6), gap=st.sampled_from(["\n\n", "\n \n", "\n\n\n  "])
)
def test_every_paragraph_is_found_where_it_begins(
    families: dict[str, Any], paragraphs: list[list[str]], gap: str
) -> None:
    written = [" ".join(sentences) for sentences in paragraphs]
    for family in ("chatml", "llama3", "llama2"):  # the Unigram tokenizer leaves line ends out
        tokenizer = families[family]
        found, ids = boundaries(tokenizer, gap.join(written))
        limit, parts = len(ids) - 1, []
        while limit > 1:
            place, kind = found.last(ids, 1, limit, "paragraph")
            if kind != "paragraph":
                break
            parts.append(found._text(ids[place:])[0].decode())
            limit = place - 1
        rests = [gap.join(written[n:]) for n in range(len(written) - 1, 0, -1)]
        assert [part.strip() for part in parts] == [rest.strip() for rest in rests], family


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(text=st.text("aé漢🙂 \n\t.'x<0A>▁Ġ", max_size=60))
def test_ids_are_spelt_as_their_text(families: dict[str, Any], text: str) -> None:
    for family in ("chatml", "llama3"):
        found, ids = boundaries(families[family], text)
        spelt, offsets = found._text(ids)
        assert spelt.decode() == text
        assert offsets[-1] == len(text.encode())
    known = "".join(
        c for c in text if c in "ae \n."
    )  # its vocabulary is small; it puts a space before a text
    found, ids = boundaries(families["llama2"], known)
    assert found._text(ids)[0].decode().removeprefix(" ") == known


def test_a_weaker_boundary_is_found_where_there_is_no_stronger_one(chatml: Any) -> None:
    text = "# One\n\nA river ran. A mill stood there; and then more words"
    found, ids = boundaries(chatml, text)
    mill = max(n for n in range(len(ids)) if chatml.decode(ids[n:]).lstrip().startswith("A mill"))
    assert found.last(ids, 1, len(ids) - 1, "chapter")[1] == "paragraph"
    assert found.last(ids, mill - 1, len(ids) - 1, "chapter") == (mill, "sentence")
    assert found.last(ids, mill + 1, len(ids) - 1, "chapter") == (len(ids) - 1, "token")


def test_a_title_ends_no_sentence(chatml: Any) -> None:
    found, ids = boundaries(chatml, "and then Mr. Falcon and Mrs. Falcon came")
    assert found.last(ids, 1, len(ids) - 1, "sentence")[1] == "token"


def test_an_overlap_begins_with_the_first_paragraph_in_it_or_else_sentence(chatml: Any) -> None:
    text = "More words. A river ran there.\n\nA mill stood there. And more words"
    found, ids = boundaries(chatml, text)
    starts = {n: chatml.decode(ids[n:-1]).lstrip() for n in range(len(ids))}
    paragraph = found.first(ids, 2, len(ids) - 1)
    assert starts[paragraph].startswith("A mill")
    assert starts[found.first(ids, paragraph + 1, len(ids) - 1)].startswith("And more")
    assert found.first(ids, len(ids) - 3, len(ids) - 1) == len(ids) - 3


def test_special_tokens_have_no_text(chatml: Any) -> None:
    found, ids = boundaries(chatml, "One.")
    assert ids[-1] == chatml.eos_token_id
    assert found._text(ids)[0] == b"One."


def test_sentences_are_found_where_line_ends_are_left_out() -> None:
    vocabulary = {"[UNK]": 0, "the": 1, "mill": 2, "##er": 3, ".": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    from tokenizers import decoders

    tokenizer.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    found, ids = boundaries(fast, "the miller.\n\nthe mill")
    assert found._text(ids)[0] == b" the miller . the mill"
    assert found.last(ids, 1, len(ids), "paragraph") == (4, "sentence")


@pytest.mark.parametrize("filler", ["\n", " ", "\f", "\n ", ".", "#", "\n#", "I", "\nI", ". "])
def test_long_runs_take_time_in_proportion(filler: str, chatml: Any) -> None:
    found = Boundaries(chatml)
    seconds = []
    for size in (20_000, 200_000):
        ids = np.array(
            [found._spelt.index(c.encode()) for c in filler] * (size // len(filler)), dtype=np.int32
        )
        start = time.process_time()
        for kind in ("chapter", "paragraph", "sentence"):
            found.last(ids, len(ids) - 1, len(ids) - 1, kind)  # type: ignore[arg-type]
        seconds.append(time.process_time() - start)
    assert seconds[1] < 30 * seconds[0] + 0.2
