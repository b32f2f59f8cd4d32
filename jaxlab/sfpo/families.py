"""Families of problems with exact answers: reasoning-gym's, in few characters, and a split without overlap."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from jaxlab.core.errors import require

HELD_OUT_SEED, TRAIN_SEED = 1 << 40, 0
"""reasoning-gym makes item i of a data set from seed + i, so that near seeds give the same problems again."""


@dataclasses.dataclass(frozen=True)
class Family:
    """Problems of one kind.

    Attributes:
      generator: name of reasoning-gym's data set.
      options: its settings.
      write: item of the data set -> prompt and answer.
      label: what is to be done, for pictures and tables.
    """

    generator: str
    options: Mapping[str, Any]
    write: Callable[[Mapping[str, Any]], tuple[str, str]]
    label: str


def _expression(entry: Mapping[str, Any]) -> tuple[str, str]:
    return entry["metadata"]["expression"].replace(" ", "") + "=", entry["answer"]


def _divisor(entry: Mapping[str, Any]) -> tuple[str, str]:
    return "&".join(map(str, entry["metadata"]["numbers"])) + "=", entry["answer"]


def _backward(entry: Mapping[str, Any]) -> tuple[str, str]:
    return entry["metadata"]["word"].lower() + "~", entry["answer"].lower()


def _sorting(entry: Mapping[str, Any]) -> tuple[str, str]:
    def told(numbers: list[str]) -> str:
        return ",".join(str(int(float(number))) for number in numbers)

    made = entry["metadata"]
    sign = {"ascending": "<", "descending": ">"}[made["direction"]]
    return told(made["original_numbers"]) + sign, told(made["sorted_numbers"])


FAMILIES: dict[str, Family] = {
    "chain_sum": Family(
        "chain_sum",
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        _expression,
        "sums and differences of two or three numbers",
    ),
    "gcd": Family(
        "gcd",
        {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 99},
        _divisor,
        "greatest common divisor",
    ),
    "spell_backward": Family(
        "spell_backward", {"min_word_len": 3, "max_word_len": 6}, _backward, "words spelled backward"
    ),
    "number_sorting": Family(
        "number_sorting",
        {
            "min_numbers": 3,
            "max_numbers": 3,
            "min_decimals": 0,
            "max_decimals": 0,
            "min_value": 0,
            "max_value": 99,
        },
        _sorting,
        "three numbers sorted",
    ),
}
"""Name -> family; sizes are ours."""


def problems(family: str, count: int, held_out: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Rows for training and rows held out, {"prompt", "answer"} each; no prompt occurs twice, within or across.

    They are the same in every run: seeds of a study change their order, not the problems.

    Args:
      family: a name in `FAMILIES`.
      count: rows for training.
      held_out: rows held out, which are drawn first.

    Raises:
      ValueError: unknown family, or it has fewer different problems.
      MissingExtra: reasoning-gym is not installed.
    """
    if family not in FAMILIES:
        raise ValueError(f"family: expected one of {', '.join(FAMILIES)}, got {family!r}")
    test = list(_distinct(family, HELD_OUT_SEED, held_out, ()))
    train = list(_distinct(family, TRAIN_SEED, count, {row["prompt"] for row in test}))
    return train, test


def _distinct(family: str, seed: int, count: int, taken: Collection[str]) -> Iterator[dict[str, str]]:
    kind = FAMILIES[family]
    drawn = 4 * count + 1000
    data: Any = require("reasoning_gym", "rl")
    seen = set(taken)
    for entry in data.create_dataset(kind.generator, size=drawn, seed=seed, **kind.options):
        if len(seen) == len(taken) + count:
            return
        prompt, answer = kind.write(entry)
        if prompt not in seen:
            seen.add(prompt)
            yield {"prompt": prompt, "answer": answer}
    if len(seen) < len(taken) + count:
        raise ValueError(
            f"{family}: expected {count} different problems, found {len(seen) - len(taken)} in {drawn} draws"
        )
