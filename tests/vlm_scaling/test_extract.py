"""What is taken for the answer, by our rules and by the tools', and that no text can make it slow."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.vlm_scaling import extract
from tests.oracles import answer_rules as oracle
from tests.timing import within

COLOURS = {"A": "red", "B": "blue", "C": "dark red", "D": "12"}
PIECES = ["A", "B", "C", "E", "(B)", "C.", "D:", "A)", " ", "\n", "red", "blue", "x", "Z", ".", "'", "!", "**"]
PIECES += ["The answer is ", "the correct answer is ", "best option is", "Best answer:", "my choice is", "\u9009"]
PIECES += ["i pick ", "word "]
texts = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)


@pytest.mark.parametrize(
    ("text", "choices", "value", "method"),
    [
        ("<think>1</think><answer> 7 </answer> \\boxed{8}", None, "7", "answer_tag"),
        ("<answer> </answer><answer>7</answer>", None, "7", "answer_tag"),
        ("<think>\\boxed{1}</think> \\boxed{\\frac{1}{2}} 9", None, "\\frac{1}{2}", "boxed"),
        ("\\boxed{3} and \\boxed{4", None, "3", "boxed"),
        ("It is -5, or 1,234.50 dollars.", None, "1234.50", "number"),
        ("10-5", None, "5", "number"),
        ("1,234,5678", None, "5678", "number"),
        ("in [2007,2008]", None, "2008", "number"),
        ("x = \u22123", None, "-3", "number"),
        ("about 3/4 of 50%", None, "50%", "number"),
        ("the rest is 3/4", None, "3/4", "number"),
        ("nothing", None, None, "none"),
        ("<answer>(B) blue</answer>", COLOURS, "B", "answer_tag"),
        ("\\boxed{\\text{C}}", COLOURS, "C", "boxed"),
        ("<answer>blue</answer>", COLOURS, "B", "answer_tag"),
        ("A is wrong. The answer is **B**. Not C.", COLOURS, "B", "declaration"),
        ("Answer: (c)", COLOURS, "C", "declaration"),
        ("The answer is a matter of taste: (B)", COLOURS, "B", "letter"),
        ("A ball that is blue (B), I think", COLOURS, "B", "letter"),
        ("So B", COLOURS, "B", "letter"),
        ("A or B", COLOURS, None, "none"),
        ("it looks dark red", COLOURS, "C", "option_text"),
        ("it looks infrared", COLOURS, None, "none"),
        ("blue, no, red", COLOURS, None, "none"),
        ("7 or 12", {"A": "7", "B": "12"}, "B", "number"),
    ],
)
@pytest.mark.latest
def test_ours(text, choices, value, method):
    found = extract.extract(text, choices=choices)
    assert (found.value, found.method) == (value, method)
    if method in ("number", "boxed", "answer_tag") and choices is None:
        assert text[slice(*found.span)].replace(",", "").replace("\u2212", "-") == value
    elif found.span is not None and method in ("declaration", "letter"):
        assert text[slice(*found.span)].upper() == value


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "<analysis>", "</analysis>", "a", " ", "7"]), max_size=12))
def test_thinking_is_stripped(parts):
    text = "".join(parts)
    assert extract.strip_thinking(text) == oracle.strip_thinking(text)
    number = extract.extract(text)
    if number.value:  # what was stripped may be inside
        assert oracle.strip_thinking(text[slice(*number.span)]) == number.value


@settings(max_examples=200, deadline=None)
@given(texts)
def test_letters_of_the_tools(text):
    choices = {letter: COLOURS[letter] for letter in "ABCD"}
    assert extract.choice_letter(text, choices, style="lmms-eval") == oracle.lmms_eval_letter(text, "ABCD")
    assert extract.choice_letter(text, choices, style="vlmevalkit") == oracle.vlmevalkit_letter(text, choices)
    letter = extract.choice_letter(text, choices, style="vlmevalkit-regex")
    assert letter == oracle.vlmevalkit_regex_letter(text, "ABCD")


@pytest.mark.parametrize(
    ("style", "text", "letter"),
    [
        ("lmms-eval", "B", "B"),
        ("lmms-eval", '"B.', "B"),  # quotes go after full stops, and there is no second round
        ("lmms-eval", "Both, so C", "C"),
        ("lmms-eval", "the answer is not A but B here", "B"),
        ("lmms-eval", "(A) or B. then", "A"),
        ("lmms-eval", "b", ""),
        ("vlmevalkit", "B. because of all the things that were said", ""),
        ("vlmevalkit", "the answer is **c and much else, said at length", "C"),
        ("vlmevalkit", "It is BLUE", "B"),
        ("vlmevalkit", "Cannot determine the answer: B", ""),
        ("vlmevalkit-regex", "Answer: C", "A"),
        ("vlmevalkit-regex", "", "A"),
        ("vlmevalkit-regex", "b)", "B"),
        ("vlmevalkit-regex", "one two three four five six seven eight nine ten eleven", ""),
    ],
)
def test_known_letters(style, text, letter):
    assert extract.choice_letter(text, COLOURS, style=style) == letter


def test_lmms_eval_answers():
    for text, value in {
        "<answer></answer> \\boxed{3}": "",
        "\\boxed{3} 4": "3",
        "\\boxed{} 4": "4",
        "\\boxed{3 is 4.": "4",
        "We have 3.14 .\nthat is it": "3.14",
        "-5": "5",
        "x5": None,
    }.items():
        assert extract.extract(text, style="lmms-eval").value == value
    assert extract.extract("\\boxed{B} or A", choices=COLOURS, style="lmms-eval").value == "B"
    assert extract.extract("so", choices=COLOURS, style="vlmevalkit").value is None
    assert extract.extract(" so ", style="vlmevalkit").value == "so"


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["1", "23", ".", " ", "\n", "a", "_", "\u0663", "\t", "-"]), max_size=12).map("".join))
def test_closing_number(text):
    assert extract.extract(text, style="lmms-eval").value == oracle.closing_number(text)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.sampled_from(["jaxlab", "lmms-eval", "vlmevalkit", "vlmevalkit-regex"]))
def test_any_text_has_an_answer_or_none(text, style):
    for choices in (None, COLOURS):
        found = extract.extract(text, choices=choices, style=style)
        assert found.value is None or isinstance(found.value, str)
        assert found.span is None or 0 <= found.span[0] <= found.span[1] <= len(text)


HOSTILE = ["\\boxed{", "{", "}", "<think>", "</think>", "<think></think>", "<answer>", "</answer>", "(A", "A ", "(((("]
HOSTILE += ["1 .", " ", "\n", "\u00a0\x00", "answer is ", "answer is **", "9", "-", "$", "\\text{", "\u0130", "1/2/"]
HOSTILE += ["1,234", ",234", "1e", "1.", "blue,"]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_texts_take_linear_time(piece, unchecked):
    text = "so 1" + piece * (60_000 // len(piece)) + "5x"
    with within(1.0):  # some hundredths of a second in truth; the square of the length would be minutes
        for style in ("jaxlab", "lmms-eval", "vlmevalkit", "vlmevalkit-regex"):
            for choices in (None, COLOURS):
                extract.extract(text, choices=choices, style=style)


def test_bad_arguments(unchecked):
    for call in (extract.extract, lambda text, style: extract.choice_letter(text, COLOURS, style=style)):
        with pytest.raises(ValueError, match=r"style: expected one of jaxlab, lmms-eval, .* got 'none'"):
            call("B", style="none")
    with pytest.raises(ValueError, match="choices: expected at least one"):
        extract.choice_letter("B", {}, style="lmms-eval")
