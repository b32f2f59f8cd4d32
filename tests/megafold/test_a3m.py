"""Alignments: against a reader that goes letter by letter, and every way to be none."""

import pickle

import numpy as np
import pytest

from jaxlab.megafold.data import A3MError, parse_a3m
from tests.megafold.data_files import af3
from tests.oracles import megafold_data as oracle
from tests.timing import within

ALIGNMENTS = [
    ("msa/721p-assembly1A_protein.a3m", (15953, 166)),
    ("msa/7a4d-assembly1E_protein.a3m", (2, 40)),
    ("msa/protenix_7r6r_1/non_pairing.a3m", (375, 203)),
    ("openproteinset/1a02_F/uniref90_hits.a3m", (1117, 56)),
]


@pytest.mark.parametrize(("name", "shape"), ALIGNMENTS)
def test_real_alignments(name, shape):
    text = af3(name).read_text()
    with within(1.0):
        msa = parse_a3m(text)
    names, rows, deletions = oracle.a3m(text)
    assert msa.deletions.shape == shape
    assert msa.deletions.dtype == np.int32
    assert msa.names == names
    assert msa.sequences == rows
    np.testing.assert_array_equal(msa.deletions, deletions)
    np.testing.assert_array_equal(msa.letters()[-1], [ord(letter) for letter in rows[-1]])


@pytest.mark.latest
def test_insertions_lines_and_duplicates():
    msa = parse_a3m("\n>q one\r\nAC-\r\nX\r\n>r\r\nabA-cGTxy\r\n\r\n>r\r\n----\r\n>r\r\n----")
    assert msa.names == ["q one", "r", "r", "r"]
    assert msa.sequences == ["AC-X", "A-GT", "----", "----"]
    np.testing.assert_array_equal(msa.deletions, [[0] * 4, [2, 0, 1, 0], [0] * 4, [0] * 4])


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("", 1, "got nothing"),
        ("\n \n", 1, "got nothing"),
        ("ACDE\n", 1, "expected '>'"),
        ("\nAC\n>q\nAC\n", 2, "expected '>'"),
        (">q\nACD\n>short\nAC\n", 3, "expected 3 columns, as the query has, got 2 in '>short'"),
        (">q\nACD\n>long\nACDE\n", 3, "got 4"),
        (">q\nACD\n>lower\nacd\n", 3, "got 0"),
        (">q\n>r\nA\n", 1, "at least 1 columns"),
        (">q\nAC\n>r\nA\n-\n>s\nA\nC3\n", 8, "got '3' in '>s'"),
        (">q\nA C\n", 2, "got ' '"),
        (">q\nAC*\n", 2, r"got '\*'"),
        (">q\nAC.\n", 2, "got '.'"),
        (">q\nAÇ\n", 2, "got 'Ç'"),
        (">q\nA漢\n", 2, "got '漢'"),
    ],
)
def test_what_is_no_alignment(text, line, problem):
    with pytest.raises(A3MError, match=problem) as raised:
        parse_a3m(text, file="some.a3m")
    assert (raised.value.file, raised.value.line) == ("some.a3m", line)
    assert f"some.a3m, line {line}: " in str(raised.value)
    again = pickle.loads(pickle.dumps(raised.value))  # it crosses processes
    assert (str(again), again.line) == (str(raised.value), line)


def test_text_has_no_file():
    with pytest.raises(A3MError, match="a3m, line 1") as raised:
        parse_a3m("")
    assert raised.value.file is None
