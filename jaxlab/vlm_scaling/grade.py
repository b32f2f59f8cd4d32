r"""Whether an answer is right, by the conventions in use, and the key under which answers are votes for the same thing.

    from jaxlab.vlm_scaling import grade
    grade.answer_key(r"\frac{1}{2}") == grade.answer_key("50%")   # one vote
    grade.relaxed("10.5", "10")                                   # ChartQA: within 5 %
    grade.math_equal("1/2", "0.5")                                # math-verify (extra `rl`)

A study grades by `correct`: right is what is the same vote as the right answer.
"""

from collections.abc import Hashable, Mapping, Sequence

from jaxlab.rl import answers
from jaxlab.vlm_scaling import peer_choices
from jaxlab.vlm_scaling.canonical import canonical
from jaxlab.vlm_scaling.extract import as_option


def answer_key(answer: str | None, *, choices: Mapping[str, str] | None = None) -> Hashable | None:
    """What answers that mean the same have in common: the option's letter, else the value, else the case-folded text.

    Args:
      answer: as `extract` gives it; None has no key.
      choices: letter -> text of the option; an answer that is none of them has the key it has without choices.
    """
    if answer is None:
        return None
    letter = as_option(answer, choices) if choices else ""
    return ("option", letter) if letter else canonical(answer)


def correct(answer: str | None, gold: str, *, choices: Mapping[str, str] | None = None) -> bool:
    """Whether an answer has the key of the right one, so that a group of votes is right or wrong as a whole.

    None is wrong, and so is an answer without content.
    """
    return bool(answer and answer.strip()) and answer_key(answer, choices=choices) == answer_key(gold, choices=choices)


def math_equal(prediction: str, gold: str, *, timeout: float = 5.0) -> bool:
    """math-verify's `verify(parse(gold), parse(prediction))`, from any thread; not symmetric.

    Equal texts and plain numbers are compared on the spot (`jaxlab.rl.answers.compare`, which also takes a batch and
    says why a comparison failed); one that exceeds its time or crashes is False.

    Args:
      prediction: an answer.
      gold: the right one; an option's letter is no mathematics: compare those by `answer_key`.
      timeout: seconds, after which the worker is killed.

    Raises:
      MissingExtra: math-verify is not installed.
      ValueError: `timeout` not above 0.
    """
    return answers.compare([prediction], [gold], timeout_s=timeout)[0].equal


def relaxed(prediction: str, target: str, *, tolerance: float = 0.05) -> bool:
    """ChartQA's relaxed accuracy (arXiv 2203.10244, section 5.1, as pix2struct computes it).

    Numbers may be off by `tolerance` of the target, inclusive; one that ends in % is divided by 100. With a target of
    0, or where one of the two is no number, the texts must be equal, upper and lower case alike: "0.0" is not "0".
    """
    number, right = _percent(prediction), _percent(target)
    if number is not None and right:
        return abs(number - right) / abs(right) <= tolerance
    return prediction.lower() == target.lower()


def _percent(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def mathvista(
    response: str,
    *,
    question_type: str,
    answer: str,
    answer_type: str,
    answer_option: str = "",
    choices: Sequence[str] = (),
) -> bool:
    """MathVista's rule without a judge, as VLMEvalKit applies it to what was extracted (`post_check`).

    Args:
      response: the extracted answer.
      question_type: "multi_choice": VLMEvalKit's letter rule against `answer_option`; else "free_form".
      answer: the right one.
      answer_type: "integer" ("12.0" is none, blanks around are allowed), "float" (equal after parsing), else the text,
        outer blanks aside.
      answer_option: letter of the right option.
      choices: texts of the options.

    Raises:
      ValueError: multiple choice without `choices`.
    """
    if question_type == "multi_choice":
        if not choices:
            raise ValueError("choices: expected the options of a multi_choice question, got none")
        options = {chr(ord("A") + index): str(option) for index, option in enumerate(choices)}
        letter = peer_choices.vlmevalkit(response, options)
        return bool(letter) and letter == answer_option
    parse = {"integer": int, "float": float}.get(answer_type, str.strip)
    try:
        return parse(response) == parse(answer)
    except ValueError:
        return False
