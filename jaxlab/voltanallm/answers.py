"""What the server answers with: the text of growing rows, and OpenAI's objects around it."""

import dataclasses
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.inference.text import RowText

_WINDOW = 64  # tokens that are decoded again with each new one


class GrowingText:
    """The text of one row while its tokens come, at a cost a token that does not grow with the row.

    Joined, the pieces are the text of the row before its stop string; none ends inside a character. Without a tokenizer
    the text is the ids in decimal, separated by spaces.

    Args:
      tokenizer: None, or with `decode(ids) -> str`.
      stop: strings that end the row.
      stop_ids: ids that end the row; with a tokenizer they are no text.
      eager: give text as soon as it is certain; otherwise with the last token only.
      continues: there is text before it.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        *,
        eager: bool = True,
        continues: bool = False,
    ):
        self._reader = None if tokenizer is None else RowText(tokenizer, stop, stop_ids)
        self._stops, self._eager = bool(stop), eager or bool(stop)
        self._continues = continues
        self._ids: list[int] = []
        self._first = 0  # where the window starts: what lies before has been given and is held in no stop string
        self._given = 0  # characters of the window's text that have been given
        self.ended = False

    def add(self, new: Sequence[int], *, last: bool) -> tuple[str, int]:
        """Takes new tokens.

        Returns:
          the new text, and how many of `new` belong to the row: fewer where a stop string ends it, which `ended` tells.
        """
        before = len(self._ids)
        self._ids += new
        if self._reader is None:
            given = " ".join(map(str, new))
            return (" " if new and (before or self._continues) else "") + given, len(new)
        if not (last or self._eager):
            return "", len(new)
        window = np.asarray(self._ids[self._first :], np.int32)
        if self._stops:
            count = self._reader.completed(window, before - self._first)
            if count is not None:
                window, self.ended = window[:count], True
                del self._ids[self._first + count :]
        text = self._reader.final(window) if last or self.ended else self._reader.settled(window)
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        if len(window) > 2 * _WINDOW:
            self._move(text)
        return piece, len(self._ids) - before

    def _move(self, text: str) -> None:
        """Moves the window up where the text of its second half is the end of the text of the whole."""
        first = len(self._ids) - _WINDOW
        tail = self._reader.settled(np.asarray(self._ids[first:], np.int32)) if self._reader is not None else ""
        skipped = len(text) - len(tail)
        if tail and text.endswith(tail) and skipped <= self._given:
            self._first, self._given = first, self._given - skipped


@dataclasses.dataclass
class Choice:
    """One answer as far as it has come: its index, its text, and what of it has not been sent."""

    index: int
    text: GrowingText
    keeps_logprobs: bool = False
    pieces: list[str] = dataclasses.field(default_factory=list)
    records: list[tuple[int, float, Mapping[int, float]]] = dataclasses.field(default_factory=list)  # of tokens
    tokens: int = 0
    offset: int = 0  # characters of the tokens told so far
    finish_reason: str | None = None

    def take(self, output: Any) -> bool:
        """Takes the engine's output; True where a stop string ended the row before the engine knew."""
        piece, kept = self.text.add(output.new_token_ids, last=output.finish_reason is not None)
        self.pieces.append(piece)
        self.tokens += kept
        if self.keeps_logprobs:
            self.records += zip(output.new_token_ids[:kept], output.logprobs, output.top_logprobs)
        self.finish_reason = "stop" if self.text.ended else output.finish_reason
        return self.text.ended and output.finish_reason is None


class Answer:
    """The objects that answer one request.

    Args:
      model: its name.
      chat: chat's objects, else completions'.
      tokenizer: tells tokens in log-probabilities; None: ids in decimal.
      logprobs: tell tokens with their log-probabilities.
      counts_usage: a stream ends with an event that counts tokens.
      prompt_tokens: of all prompts, each counted once.
    """

    def __init__(
        self, model: str, *, chat: bool, tokenizer: Any, logprobs: bool, counts_usage: bool, prompt_tokens: int
    ):
        self._chat, self._tokenizer, self._logprobs, self._prompt_tokens = chat, tokenizer, logprobs, prompt_tokens
        self._counts_usage = counts_usage
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The whole answer."""
        return {
            **self._head,
            "choices": [self._choice(choice, "message") for choice in choices],
            "usage": self._usage(choices),
        }

    def first(self, choice: Choice) -> bytes:
        """The event that opens a choice: who speaks, in a chat."""
        if not self._chat:
            return b""
        delta = {"role": "assistant", "content": ""}
        return self._event([{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def piece(self, choice: Choice) -> bytes:
        """The event of what has come of a choice since the last; empty where there is nothing to tell yet."""
        if choice.finish_reason is None and not any(choice.pieces):
            return b""
        return self._event([self._choice(choice, "delta")])

    def last(self, choices: Sequence[Choice]) -> bytes:
        """The event that counts tokens, where it was asked for, and the end of the stream."""
        return (self._event([], self._usage(choices)) if self._counts_usage else b"") + b"data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        head = self._head | {"object": "chat.completion.chunk"} if self._chat else self._head
        return event({**head, "choices": choices, **({"usage": usage} if self._counts_usage else {})})

    def _choice(self, choice: Choice, part: str) -> dict[str, Any]:
        text = "".join(choice.pieces)
        logprobs = (self._chat_logprobs(choice) if self._chat else self._lists(choice)) if self._logprobs else None
        choice.pieces.clear()
        choice.records.clear()
        said: dict[str, Any] = {"text": text}
        if self._chat:
            said = {part: {"role": "assistant", "content": text} if part == "message" else {"content": text}}
        return {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        made = sum(choice.tokens for choice in choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._prompt_tokens + made,
        }

    def _token(self, token: int) -> tuple[str, list[int] | None]:
        """A token's text and bytes; one that is no text by itself is told by its id, so that no two are told alike."""
        text = str(token) if self._tokenizer is None else self._tokenizer.decode([token])
        if not text or "\ufffd" in text:
            return f"token_id:{token}", None
        return text, list(text.encode())

    def _chat_logprobs(self, choice: Choice) -> dict[str, Any]:
        def told(token: int, logprob: float) -> dict[str, Any]:
            text, data = self._token(token)
            return {"token": text, "logprob": logprob, "bytes": data}

        content = [
            {**told(token, logprob), "top_logprobs": [told(*each) for each in top.items()]}
            for token, logprob, top in choice.records
        ]
        return {"content": content, "refusal": None}

    def _lists(self, choice: Choice) -> dict[str, Any]:
        tokens = [self._token(token)[0] for token, _, _ in choice.records]
        offsets = []
        for token in tokens:
            offsets.append(choice.offset)
            choice.offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [logprob for _, logprob, _ in choice.records],
            "top_logprobs": [
                {self._token(token)[0]: logprob for token, logprob in top.items()} for _, _, top in choice.records
            ],
            "text_offset": offsets,
        }


def event(content: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
