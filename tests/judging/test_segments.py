"""Sentences and clauses, on texts whose cuts are written out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lco_lite.judging.classifiers import clauses, sentences


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        (" \n ", []),
        ("No stop", ["No stop"]),
        ("It rained. We left.", ["It rained.", "We left."]),
        ("Did it? Yes! It did.", ["Did it?", "Yes!", "It did."]),
        ("He met Dr. Smith in St. Louis. They talked.", ["He met Dr. Smith in St. Louis.", "They talked."]),
        ("J. R. R. Tolkien lived in the U.S. Army camp.", ["J. R. R. Tolkien lived in the U.S. Army camp."]),
        ("It cost 3.5 million. That was 2.0 more.", ["It cost 3.5 million.", "That was 2.0 more."]),
        ('He said "No." She left.', ['He said "No."', "She left."]),
        ("First\n\nsecond", ["First", "second"]),
    ],
)
def test_sentences(text, parts):
    assert sentences(text) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("one two three four five, six seven eight nine ten eleven", [5, 6]),
        ("one two three four, five six seven eight nine ten", [10]),  # the first is short: it joins the next
        ("one two three four five, six seven eight nine ten", [10]),  # five words follow, not more
        (
            "one two three four five, six seven, eight nine ten eleven twelve thirteen",
            [7, 6],
        ),  # short: joins the one before
        ("a b c d e; f g h i j! k l m n o p", [5, 5, 6]),
        ("a b c d e, f g h i j k. A b c d e, f g h i j k.", [5, 6, 5, 6]),
    ],
)
def test_clauses_have_five_words_at_least(text, parts):
    assert [len(clause.split()) for clause in clauses(text)] == parts


@given(st.text(alphabet=st.sampled_from("ab AB.,;!? \n\"'0"), max_size=200))
def test_nothing_is_lost_or_doubled(text):
    assert " ".join(sentences(text)).split() == text.split()
    assert " ".join(clauses(text)).split() == text.split()
