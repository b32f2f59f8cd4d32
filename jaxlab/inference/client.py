"""Talking to an OpenAI-compatible endpoint: chat and completions, whole or as a stream, with patience.

    with Client("http://localhost:8000/v1", model="llama") as client:
        print(client.chat([{"role": "user", "content": "Hello"}], max_tokens=16).text)
        for piece in client.stream_chat([{"role": "user", "content": "Hello"}]):
            print(piece.text, end="")

`AsyncClient` is the same with `await` and `async for`; `Client` runs one on a thread of its own.
"""

import asyncio
import contextlib
import datetime
import email.utils
import random
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jaxlab.core.errors import require
from jaxlab.inference.endpoint import (
    SHOWN,
    Completion,
    EndpointError,
    Piece,
    error_text,
    read_completion,
    read_pieces,
    without_password,
)

T = TypeVar("T")
Message = Mapping[str, Any]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})


class AsyncClient:
    """A client for code that runs in an event loop; safe to use from many tasks of it at once."""

    def __init__(
        self,
        base_url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 120.0,
        stall_s: float = 30.0,
        connect_s: float = 10.0,
        max_retries: int = 5,
        backoff_s: float = 0.5,
        max_backoff_s: float = 30.0,
        concurrency: int = 8,
        headers: Mapping[str, str] | None = None,
    ):
        """Connects to nothing yet.

        Args:
          base_url: up to and with the version, such as "http://localhost:8000/v1". Proxies that the environment names
            are used, but not for this machine's own addresses, which no proxy could reach.
          model: the model asked for, where a call names none.
          api_key: sent as a bearer token.
          timeout_s: limit for one attempt at a whole answer.
          stall_s: limit for the next piece of a stream.
          connect_s: limit for a connection.
          max_retries: how many more times a request is tried after a refusal for now (408, 429, 500, 502, 503, 504), a
            broken connection or a time limit. A stream is tried again only as long as nothing of it has come.
          backoff_s: wait before the first retry; it doubles from one to the next, and half of it is random.
          max_backoff_s: the longest wait. An endpoint's Retry-After is kept to, and one that is longer ends the tries.
          concurrency: requests under way at once; more wait for their turn.
          headers: sent along.

        Raises:
          MissingExtra: httpx is not installed.
          ValueError: not an HTTP address, or a limit out of range.
        """
        self._httpx = require("httpx", "agents")
        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url: expected an http:// or https:// address, got {without_password(base_url)!r}")
        for name, value in {"timeout_s": timeout_s, "stall_s": stall_s, "connect_s": connect_s}.items():
            if not value > 0:
                raise ValueError(f"{name}: expected more than 0 seconds, got {value}")
        for name, value in {"max_retries": max_retries, "backoff_s": backoff_s, "max_backoff_s": max_backoff_s}.items():
            if not value >= 0:
                raise ValueError(f"{name}: expected at least 0, got {value}")
        if concurrency < 1:
            raise ValueError(f"concurrency: expected at least 1, got {concurrency}")
        self.base_url, self.model = base_url.rstrip("/"), model
        self._timeout_s, self._stall_s, self._max_retries = timeout_s, stall_s, max_retries
        self._backoff_s, self._max_backoff_s = backoff_s, max_backoff_s
        self._turn = asyncio.Semaphore(concurrency)
        bearer = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = self._httpx.AsyncClient(
            headers={**bearer, **(headers or {})},
            timeout=self._httpx.Timeout(timeout_s, connect=connect_s),
            trust_env=self._httpx.URL(base_url).host not in _LOOPBACK,
            limits=self._httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )

    async def chat(self, messages: Sequence[Message], *, model: str | None = None, **options: Any) -> Completion:
        """A whole answer to a conversation.

        Args:
          messages: of roles and contents.
          model: in place of the client's.
          **options: of the request, such as `max_tokens`, `temperature`, `top_p`, `n`, `stop`, `seed`, `logprobs=True`,
            `top_logprobs=5`.

        Raises:
          EndpointError: see there.
          ValueError: no model is named.
        """
        body = {"messages": [dict(message) for message in messages], **options}
        return read_completion(await self._ask("/chat/completions", body, model), without_password(self.base_url))

    async def complete(self, prompt: str | Sequence[int], *, model: str | None = None, **options: Any) -> Completion:
        """A whole continuation of a text, or of token ids; as `chat`, but `logprobs` is a number here."""
        answer = await self._ask("/completions", {"prompt": prompt, **options}, model)
        return read_completion(answer, without_password(self.base_url))

    async def stream_chat(
        self, messages: Sequence[Message], *, model: str | None = None, **options: Any
    ) -> AsyncGenerator[Piece, None]:
        """The answer to a conversation, piece by piece as it comes; arguments and errors of `chat`."""
        body = {"messages": [dict(message) for message in messages], **options}
        async with contextlib.aclosing(self._stream("/chat/completions", body, model)) as pieces:
            async for piece in pieces:
                yield piece

    async def stream_complete(
        self, prompt: str | Sequence[int], *, model: str | None = None, **options: Any
    ) -> AsyncGenerator[Piece, None]:
        """The continuation of a text, piece by piece; arguments and errors of `complete`."""
        async with contextlib.aclosing(self._stream("/completions", {"prompt": prompt, **options}, model)) as pieces:
            async for piece in pieces:
                yield piece

    async def models(self) -> list[str]:
        """Names of the models that the endpoint serves.

        Raises:
          EndpointError: see there.
        """
        answer = await self._ask("/models", None, None)
        return [str(each["id"]) for each in answer.get("data", [])]

    async def aclose(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        await self.aclose()

    def _body(self, body: Mapping[str, Any], model: str | None) -> dict[str, Any]:
        name = model or self.model
        if name is None:
            raise ValueError("model: expected a name, here or at the client, got none")
        return {"model": name, **{key: value for key, value in body.items() if value is not None}}

    async def _ask(self, path: str, body: Mapping[str, Any] | None, model: str | None) -> dict[str, Any]:
        method, sent = ("GET", None) if body is None else ("POST", self._body(body, model))
        async for attempt in self._attempts(path):
            with attempt:
                async with self._turn, asyncio.timeout(self._timeout_s):
                    answer = await self._http.request(method, self.base_url + path, json=sent)
                attempt.check(answer.status_code, answer.headers, answer.text)
                try:
                    return dict(answer.json())
                except (ValueError, TypeError, RecursionError) as error:
                    raise attempt.error(f"expected JSON, got {answer.text[:SHOWN]!r}") from error
        raise AssertionError("an attempt returns or raises")

    async def _stream(self, path: str, body: Mapping[str, Any], model: str | None) -> AsyncGenerator[Piece, None]:
        sent = {**self._body(body, model), "stream": True}
        async for attempt in self._attempts(path):
            with attempt:
                async with self._turn, self._http.stream("POST", self.base_url + path, json=sent) as answer:
                    if answer.status_code != 200:
                        attempt.check(
                            answer.status_code, answer.headers, (await answer.aread()).decode(errors="replace")
                        )
                    lines = aiter(answer.aiter_lines())
                    while True:
                        async with asyncio.timeout(self._stall_s):
                            line = await anext(lines, None)
                        if line is None:
                            raise self._httpx.RemoteProtocolError("the stream ended before its last piece")
                        if not line.startswith("data:"):
                            continue
                        data = line[5:].strip()
                        if data == "[DONE]":
                            return
                        for piece in read_pieces(data, attempt.error):
                            attempt.partial += piece.text
                            yield piece

    async def _attempts(self, path: str) -> AsyncIterator["_Attempt"]:
        for number in range(1, self._max_retries + 2):
            attempt = _Attempt(
                self._httpx,
                without_password(self.base_url + path),
                number,
                number <= self._max_retries,
                self._max_backoff_s,
            )
            yield attempt
            ceiling = min(self._max_backoff_s, self._backoff_s * 2 ** (number - 1))
            wait = ceiling * (0.5 + random.random() / 2)
            await asyncio.sleep(wait if attempt.retry_after is None else attempt.retry_after)


class _Attempt:
    """One try at a request: a context that swallows what is worth another try; the rest becomes `EndpointError`."""

    def __init__(self, httpx: Any, url: str, number: int, more: bool, longest_wait_s: float):
        self._httpx, self._url, self._number, self._more, self._longest_s = httpx, url, number, more, longest_wait_s
        self.retry_after: float | None = None
        self.partial = ""

    def error(self, what: str, status: int | None = None) -> EndpointError:
        """The error that ends the tries."""
        times = "" if self._number == 1 else f" (attempt {self._number})"
        return EndpointError(f"{self._url}: {what}{times}", status=status, attempts=self._number, partial=self.partial)

    def check(self, status: int, headers: Mapping[str, str], text: str) -> None:
        """Raises for an answer that is none."""
        if status == 200:
            return
        what = f"HTTP {status}: {error_text(text)}"
        if status not in _RETRIED or not self._more:
            raise self.error(what, status)
        self.retry_after = _retry_after(headers.get("retry-after"))
        if self.retry_after is not None and self.retry_after > self._longest_s:
            raise self.error(
                f"{what}; it asks to wait {self.retry_after:g} s, the limit is {self._longest_s:g} s", status
            )
        raise _Again(what)

    def __enter__(self):
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, _Again):
            return True
        if isinstance(error, TimeoutError):
            what = "no answer within the time limit"
        elif isinstance(error, self._httpx.TransportError):
            what = f"{type(error).__name__}: {error}"
        else:
            return False
        if self._more and not self.partial:
            return True
        raise self.error(what) from error


class _Again(Exception):
    """An answer that is worth another try."""


def _retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a number or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=datetime.UTC)
    return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())


class Client:
    """The client for code without an event loop; safe to use from many threads at once."""

    def __init__(self, base_url: str, **options: Any):
        """Takes the arguments of `AsyncClient`, and raises what that does."""
        self._client = AsyncClient(base_url, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="jaxlab-client")
        self._thread.start()

    @property
    def base_url(self) -> str:
        """Where the endpoint is."""
        return self._client.base_url

    def chat(self, messages: Sequence[Message], *, model: str | None = None, **options: Any) -> Completion:
        """`AsyncClient.chat`."""
        return self._wait(self._client.chat(messages, model=model, **options))

    def complete(self, prompt: str | Sequence[int], *, model: str | None = None, **options: Any) -> Completion:
        """`AsyncClient.complete`."""
        return self._wait(self._client.complete(prompt, model=model, **options))

    def stream_chat(self, messages: Sequence[Message], *, model: str | None = None, **options: Any) -> Iterator[Piece]:
        """`AsyncClient.stream_chat`."""
        return self._each(self._client.stream_chat(messages, model=model, **options))

    def stream_complete(
        self, prompt: str | Sequence[int], *, model: str | None = None, **options: Any
    ) -> Iterator[Piece]:
        """`AsyncClient.stream_complete`."""
        return self._each(self._client.stream_complete(prompt, model=model, **options))

    def models(self) -> list[str]:
        """`AsyncClient.models`."""
        return self._wait(self._client.models())

    def close(self) -> None:
        """Closes the connections and ends the thread; a second time does nothing."""
        if not self._loop.is_closed():
            self._wait(self._client.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C ends the request too
            raise

    def _each(self, pieces: AsyncGenerator[Piece, None]) -> Iterator[Piece]:
        try:
            while (piece := self._wait(_next(pieces))) is not None:
                yield piece
        finally:
            if not self._loop.is_closed():
                self._wait(pieces.aclose())


async def _next(pieces: AsyncIterator[Piece]) -> Piece | None:
    return await anext(pieces, None)
