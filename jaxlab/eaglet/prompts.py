"""What planner and executor read: one text each for training and for use, fitted into a model's context."""

from collections.abc import Callable
from typing import Any

from jaxlab.eaglet.executors import Context
from jaxlab.eaglet.plans import describe, plan_steps
from jaxlab.models import chat_prompt

ExecutorPrompt = Callable[[Context], tuple[str, str]]
"""A context as text: the part that must stay whole, and the part that may be cut at its beginning."""

_ASK = """Write a short global plan for an agent that is given this task in a text environment. Answer in this form:
<think> your reasoning </think><plan> Step 1: ... Step 2: ... </plan>

Task: {instruction}"""


def planner_prompt(tokenizer: Any, instruction: str) -> str:
    """What a planner continues: the task alone, in a request where the tokenizer has a chat template."""
    if getattr(tokenizer, "chat_template", None) is not None:
        return chat_prompt(tokenizer, _ASK.format(instruction=instruction))
    return f"Task: {instruction}\n"


def executor_prompt(
    context: Context, *, observations: int = 1, commands: int | None = None, next_step: bool = False
) -> tuple[str, str]:
    """What a local executor continues by a command, like the screen of a terminal.

    Task and plan come first and stay whole. What was done follows, more commands than observations, for it is the
    commands that tell how far a plan has come.

    Args:
      context: what the executor knows.
      observations: how many of the last ones are shown, the present one included.
      commands: how many of the last ones are shown; None: all.
      next_step: show of the plan the first step alone that was not tried as it stands, and that last. A small decoder
        does not have to find its place in the plan then.
    """
    step = _untried(context) if next_step else None
    shown = context.plan and not next_step
    head = f"Task: {context.task.instruction}\n" + (f"Plan: {context.plan}\n" if shown else "")
    done = len(context.history)
    lines = []
    for index, (action, observation) in enumerate(context.history):
        lines += [observation] if done - index < observations else []
        lines += [f"> {action}"] if commands is None or done - index <= commands else []
    return head, "\n".join([*lines, context.observation, f"Plan: {step}\n" if step else ">"])


def _untried(context: Context) -> str | None:
    steps = iter(plan_steps(context.plan))
    step = next(steps, None)
    for action, _ in context.history:
        step = next(steps, None) if step in (action, describe(action)) else step
    return step


def fitted(tokenizer: Any, head: str, body: str, room: int, name: str) -> list[int]:
    """The tokens of both, the body cut at its beginning where there is no room for all of it.

    Args:
      tokenizer: with `encode`.
      head: stays whole.
      body: may be cut.
      room: tokens at most.
      name: whose text it is, for the error.

    Raises:
      ValueError: the head alone leaves no room.
    """
    kept, rest = tokenizer.encode(head), tokenizer.encode(body)
    if len(kept) >= room:
        raise ValueError(
            f"length: expected room for more than task and plan of {name!r}, {len(kept)} tokens, got {room}"
        )
    return [*kept, *rest[max(0, len(kept) + len(rest) - room) :]]


def command_ids(tokenizer: Any, command: str) -> list[int]:
    """The tokens of a command and of its end: the end of a line, or of the text where lines are not kept."""
    end = continuation_ids(tokenizer, "\n")
    return [*continuation_ids(tokenizer, f" {command}"), *(end or text_end(tokenizer))]


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a text that goes on with another: without the one that some tokenizers begin a text with."""
    ids, start = list(tokenizer.encode(text)), getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if ids and ids[0] == start else ids


def text_end(tokenizer: Any) -> list[int]:
    """The token that ends a text, where there is one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
