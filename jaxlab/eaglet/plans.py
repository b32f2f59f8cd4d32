"""Plans as text, `<think> ... </think><plan> Step 1: ... Step 2: ... </plan>`: written, read, shown to executors."""

import dataclasses
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

_TAG = re.compile(r"</?(?:think|plan)>")
_STEP = re.compile(r"(?:^|\s)Step \d+:")
_MOVE = re.compile(
    r"(go|walk|run|teleport)\b.*|north|south|east|west|(open|close) door to .*|look( around)?|inventory|examine .*"
)
_INSTANCE = re.compile(r"\s+\d+\b|\s*\([^()]*\)")
OPEN = "something"
"""In a step of a plan: what the executor has to find out."""
NAMED = "it"
"""In a step of a plan: what the task, which the executor reads as well, names."""
_OFFER = "This plan may help you:"


@dataclasses.dataclass(frozen=True)
class PlanParse:
    """What was found in a planner's output.

    Attributes:
      thinking: inside of the thinking block, stripped; "" where the format is broken.
      plan: inside of the plan block, stripped; "" where the format is broken.
      ok: whether the text is exactly one thinking block and one plan block that is neither empty nor too long.
      reason: "" when ok; else "no_think", "no_plan", "unclosed", "repeated", "extra", "empty" or "too_long".
    """

    thinking: str
    plan: str
    ok: bool
    reason: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """A planner's output and what was found in it.

    Attributes:
      text: all of the output.
      thinking: inside of the thinking block.
      plan: inside of the plan block, which alone goes to executors; "" where there is none.
      ok: whether the format is right.
      reason: why not, a word of `PlanParse`.
    """

    text: str
    thinking: str
    plan: str
    ok: bool
    reason: str

    @classmethod
    def parse(cls, text: str, *, max_plan_tokens: int | None = None, tokenizer: Any = None) -> "Plan":
        """The plan in a text; takes and raises what `parse_plan` does."""
        parsed = parse_plan(text, max_plan_tokens=max_plan_tokens, tokenizer=tokenizer)
        return cls(text, parsed.thinking, parsed.plan, parsed.ok, parsed.reason)


def format_plan(thinking: str, steps: Sequence[str]) -> str:
    """The text of a plan; `parse_plan` inverts it.

    Raises:
      ValueError: no step, an empty one, or a tag of the format inside thinking or steps.
    """
    steps = [" ".join(step.split()) for step in steps]
    if not steps or not all(steps):
        raise ValueError(f"steps: expected at least one, none empty, got {steps}")
    for name, text in {"thinking": thinking, **{f"steps[{k}]": step for k, step in enumerate(steps)}}.items():
        if _TAG.search(text):
            raise ValueError(f"{name}: expected no <think> or <plan> tags inside, got {text!r}")
    body = " ".join(f"Step {k}: {step}" for k, step in enumerate(steps, 1))
    return f"<think> {thinking.strip()} </think><plan> {body} </plan>"


def parse_plan(text: str, *, max_plan_tokens: int | None = None, tokenizer: Any = None) -> PlanParse:
    """Reads a planner's output.

    White space aside, the text has to be one closed thinking block and then one closed plan block with something in it.
    A plan that is too long is cut, and not ok.

    Args:
      text: the output.
      max_plan_tokens: how long the plan may be; None: as long as it likes.
      tokenizer: counts with `encode` and cuts with `decode`; None: words between white space.

    Raises:
      ValueError: `max_plan_tokens` below 1.
    """
    if max_plan_tokens is not None and max_plan_tokens < 1:
        raise ValueError(f"max_plan_tokens: expected None or at least 1, got {max_plan_tokens}")
    tags = _TAG.findall(text)
    if tags != ["<think>", "</think>", "<plan>", "</plan>"]:
        return PlanParse("", "", False, _fault(tags))
    before, thinking, between, plan, after = (part.strip() for part in _TAG.split(text))
    if before or between or after:
        return PlanParse("", "", False, "extra")
    if not plan:
        return PlanParse(thinking, "", False, "empty")
    cut = plan if max_plan_tokens is None else _cut(plan, max_plan_tokens, tokenizer)
    return PlanParse(thinking, cut, cut == plan, "" if cut == plan else "too_long")


def _fault(tags: list[str]) -> str:
    for name in ("think", "plan"):
        if f"<{name}>" not in tags:
            return f"no_{name}"
    if len(tags) < 4:
        return "unclosed"
    return "repeated"


def _cut(plan: str, limit: int, tokenizer: Any) -> str:
    if tokenizer is None:
        words = list(re.finditer(r"\S+", plan))
        return plan if len(words) <= limit else plan[: words[limit - 1].end()]
    ids = list(tokenizer.encode(plan))
    return plan if len(ids) <= limit else tokenizer.decode(ids[:limit]).strip()


def plan_steps(plan: str) -> list[str]:
    """The steps of a plan, without their numbers; a plan without numbers is split at its lines."""
    parts = _STEP.split(plan)
    steps = parts[1:] if len(parts) > 1 else plan.splitlines()
    return [" ".join(step.split()) for step in steps if step.strip()]


def offer(plan: str) -> str:
    """The sentence that shows a plan to an executor, after MPO's harness; "" for no plan."""
    return f"{_OFFER}\n{plan}" if plan else ""


def offered(text: str) -> str:
    """The plan that `offer` put at the end of a text, or ""."""
    return text.rpartition(_OFFER)[2].strip() if _OFFER in text else ""


def describe(action: str) -> str:
    """What a gold action is called in a plan: its objects by type ("take cup 2 (empty)" is "take cup")."""
    return " ".join(_INSTANCE.sub("", action).split())


def owners(actions: Sequence[str]) -> list[int]:
    """The subgoal, by number, that each gold action serves.

    Moving about and looking serve what comes next; an action called the same as the last one serves the same.
    """
    steps = [describe(action) for action in actions]
    numbers: list[int] = []
    number = -1
    last = ""
    moving = 0
    for k, step in enumerate(steps):
        if _MOVE.fullmatch(step) and k < len(steps) - 1:
            moving += 1
            continue
        number += step != last
        numbers += [number] * (moving + 1)
        last, moving = step, 0
    return numbers


def subgoals(actions: Sequence[str]) -> list[str]:
    """Gold actions as steps of a plan: without moving about and looking, repeats once, objects by type.

    The last action is a step whatever it is.
    """
    return list({number: describe(action) for number, action in zip(owners(actions), actions)}.values())


def leave_open(steps: Sequence[str], told: Callable[[str], Collection[str]], named: Collection[str]) -> list[str]:
    """Steps of a plan with runs of words as `NAMED` or `OPEN`; of equal neighbours one.

    Args:
      steps: of a plan.
      told: the words that steps may have beside their first, which it gets; others become `OPEN`.
      named: those of them that become `NAMED`.
    """
    made: list[str] = []
    for step in steps:
        verb, *words = step.split()
        known = told(verb)
        said = [verb, *((NAMED if word in named else word) if word in known else OPEN for word in words)]
        runs = [word for word, before in zip(said, ["", *said]) if word != before or word not in (NAMED, OPEN)]
        short = " ".join(runs)
        made += [] if made[-1:] == [short] else [short]
    return made


def is_open(step: str) -> bool:
    """Whether a step leaves something open that the task does not name either."""
    return OPEN in step.split()


def says(step: str, name: str, instruction: str | None = None) -> bool:
    """Whether a step of a plan says an action of this name, which may fill in what the step leaves open.

    Args:
      step: of a plan.
      name: of an action.
      instruction: what `NAMED` is filled in from; None: from anything.
    """
    if not {NAMED, OPEN} & set(step.split()):
        return step == name
    holes = "(.+)" if instruction is not None else ".+"
    words = ({NAMED: holes, OPEN: ".+"}.get(word, re.escape(word)) for word in step.split())
    found = re.fullmatch(" ".join(words), name)
    return found is not None and set(" ".join(found.groups()).split()) <= words_of(instruction or "")


def words_of(instruction: str) -> set[str]:
    """The words of an instruction, without signs."""
    return set(re.findall(r"[\w-]+", instruction))
