import csv
import io
import json
import re
import unicodedata
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.watching.sinks.hostile import names

from learnables.watching.sinks import escape

CORPUS = names()
texts = st.one_of(st.sampled_from(CORPUS), st.text(st.characters(), min_size=1))
printed = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1)


class Page(HTMLParser):
    """The tags, attributes and text of a page, as a browser's parser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def seen_on_one_line(text: str) -> bool:
    """Nothing moves a cursor or turns the direction, and nothing is a line break."""
    turns = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    return all(
        unicodedata.category(c) not in {"Cc", "Cs", "Zl", "Zp"}
        and unicodedata.bidirectional(c) not in turns
        for c in text
    )


def test_the_corpus_is_large():
    assert len(CORPUS) >= 500


@given(texts)
def test_html_comes_back_as_text(text):
    page = Page(f'<p title="{escape.html(text)}">{escape.html(text)}</p>')
    assert page.tags == ["p"]
    assert page.attributes == [("title", escape.visible(text))]
    assert page.text == escape.visible(text)


@given(texts)
def test_json_in_a_script_comes_back_and_cannot_end_it(text):
    written = escape.json_in_script({text: [text, float("nan")]})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {text: [text, None]}


@given(texts, texts)
def test_csv_is_one_cell_and_no_formula(text, other):
    line = f"{escape.csv(text)},{escape.csv(other)}\r\n"
    (cells,) = csv.reader(io.StringIO(line, newline=""))
    for cell, given_ in zip(cells, (text, other), strict=True):
        assert cell.lstrip()[:1] not in ("=", "+", "-", "@", "＝", "＋", "－", "＠")
        assert cell.removeprefix("'") == escape.visible(given_).removeprefix("'")


@given(texts, st.booleans())
def test_a_github_command_is_one_line(text, attribute):
    written = escape.github(text, attribute)
    assert seen_on_one_line(written)
    assert not (attribute and set(":,") & set(written))


@given(printed, st.booleans())
def test_a_github_command_reads_as_it_was(text, attribute):
    written = escape.github(text + "\n" + text, attribute)
    for code, char in (("%3A", ":"), ("%2C", ","), ("%0A", "\n"), ("%0D", "\r"), ("%25", "%")):
        written = written.replace(code, char)
    assert written == text + "\n" + text


@given(texts)
def test_what_a_terminal_gets_is_seen_on_one_line(text):
    written = escape.visible(text)
    assert seen_on_one_line(written)
    assert len(written.splitlines()) <= 1


@given(texts, texts)
def test_file_names_are_safe_and_differ(text, other):
    written = escape.file_name(text)
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}", written), written
    assert not re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", written)
    assert ".." not in written
    if written.lower() == escape.file_name(other).lower():  # some file systems ignore case
        assert text.lower() == other.lower()


@given(texts)
def test_tensorboard_tags_are_seen_and_not_empty(text):
    written = escape.tensorboard_tag(text)
    assert written
    assert seen_on_one_line(written)


@pytest.mark.parametrize("name", ["blocks.0.attn.weight", "cls_token", "类别标记"])
def test_ordinary_names_stay_readable(name):
    assert escape.html(name) == escape.visible(name) == name
    assert escape.csv(name) == f'"{name}"'
