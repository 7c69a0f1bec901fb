"""Text stays text."""

from __future__ import annotations

from html.parser import HTMLParser

from hypothesis import given
from hypothesis import strategies as st

from longlora_cli.evaluation.report.markup import Markup, join, tag


class Reader(HTMLParser):
    """What a parser finds: start tags with their attributes, and all text."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def read(markup):
    reader = Reader()
    reader.feed(markup)
    reader.close()
    return reader


@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs"])),
    st.text(st.characters(exclude_categories=["Cc", "Cs"])),
)
def test_any_text_comes_back_from_an_element_and_from_an_attribute(text, value):
    found = read(tag("p", text, title=value))
    assert found.tags == [("p", {"title": value})]
    assert found.text == text


@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_at_all_can_be_encoded_and_is_one_element(text):
    found = read(tag("p", text))
    assert [name for name, _ in found.tags] == ["p"]
    assert tag("p", text).encode()


def test_finished_pieces_are_put_in_as_they_are_and_strings_are_not():
    assert join("<b>", tag("b", "x"), Markup("<hr>")) == "&lt;b&gt;<b>x</b><hr>"


def test_attributes_are_named_as_in_html_and_left_out_when_they_are_off():
    made = tag("input", class_="a", aria_label="b", hidden=True, disabled=False, value=None, maxlength=0)
    assert made == '<input class="a" aria-label="b" hidden maxlength="0">'
