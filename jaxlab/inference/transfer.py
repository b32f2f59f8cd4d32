"""Moving a request's keys and values from the worker that prefilled it to the one that decodes it.

The sender offers pages under the request's name; what `send` returns says where they are, and travels by the control
channel to the receiver, which fetches them when it has room:

    offer = sender.send("7", pages)       # on the prefill worker; returns at once
    pages = receiver.recv("7", offer)     # on the decode worker, on a thread of its own
    sender.drop("7", received=True)       # forgets what the receiver has, or (received=False) will not fetch

| backend | between | how |
|---|---|---|
| "inproc" | threads of one process | the arrays themselves |
| "tcp" | processes and machines | `TcpTransfer`: framed raw bytes, both ends prove that they know a secret |
| "jax_transfer" | processes and machines | `JaxTransfer`: device to device by `jax.experimental.transfer` |
"""

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxlab.inference.paged import KVPages

Offer = Mapping[str, Any]

BACKENDS = ("inproc", "tcp", "jax_transfer")


class RequestFailed(RuntimeError):
    """A request came to an end through no fault of its own: a server answers 503, and the caller may try again."""


class KVTransferError(RequestFailed):
    """A request's keys and values did not arrive.

    Attributes:
        peer_lost: the other side is gone or does not answer, rather than slow or wrong.
    """

    def __init__(self, message: str, *, peer_lost: bool = False):
        super().__init__(message)
        self.peer_lost = peer_lost


@runtime_checkable
class KVTransfer(Protocol):
    """One worker's end of the transfers. `send` and `drop` are called by one thread, `recv` by any."""

    @property
    def held_bytes(self) -> int:
        """Of what is offered and neither received nor dropped."""
        ...

    def send(self, request_id: str, pages: KVPages) -> Offer:
        """Offers pages to one receiver, without waiting for it. What it returns is JSON."""
        ...

    def recv(self, request_id: str, offer: Offer, *, timeout_s: float) -> KVPages:
        """Fetches what `send` offered.

        Raises:
            KVTransferError: the peer is lost, does not know the request, sends what is no such thing, or time is over.
        """
        ...

    def drop(self, request_id: str, *, received: bool = False) -> None:
        """Frees an offer: the receiver has it (`received`), or nobody will fetch it. Unknown requests are ignored."""
        ...

    def close(self) -> None:
        """Frees everything; a `recv` that waits raises."""
        ...


class InprocTransfer:
    """Between threads of one process, which share one object: the arrays change hands."""

    def __init__(self):
        self._lock = threading.Lock()
        self._offers: dict[str, KVPages] = {}

    @property
    def held_bytes(self) -> int:
        """Of what is offered and neither received nor dropped."""
        with self._lock:
            return sum(byte_count(pages) for pages in self._offers.values())

    def send(self, request_id: str, pages: KVPages) -> Offer:
        """See `KVTransfer`."""
        with self._lock:
            self._offers[request_id] = pages
        return {"bytes": byte_count(pages)}

    def recv(self, request_id: str, offer: Offer, *, timeout_s: float) -> KVPages:
        """See `KVTransfer`; never waits."""
        del offer, timeout_s
        with self._lock:
            pages = self._offers.pop(request_id, None)
        if pages is None:
            raise KVTransferError(f"request {request_id}: its keys and values are not offered")
        return pages

    def drop(self, request_id: str, *, received: bool = False) -> None:
        """See `KVTransfer`."""
        del received
        with self._lock:
            self._offers.pop(request_id, None)

    def close(self) -> None:
        """See `KVTransfer`."""
        with self._lock:
            self._offers.clear()


def open_transfer(
    backend: str, *, token: bytes = b"", host: str = "127.0.0.1", timeout_s: float = 30.0, max_bytes: int = 1 << 36
) -> KVTransfer:
    """A worker's end of the transfers by name.

    Args:
        backend: one of `BACKENDS`.
        token: the secret that "tcp" workers of one run share.
        host: the address that "tcp" and "jax_transfer" listen at.
        timeout_s: how long a peer may take over one transfer.
        max_bytes: what one request may bring at most.

    Raises:
        ValueError: an unknown backend.
        NotImplementedError: "jax_transfer" does not work here.
    """
    if backend == "inproc":
        return InprocTransfer()
    if backend == "tcp":
        from jaxlab.inference.tcp_transfer import TcpTransfer

        return TcpTransfer(token, host=host, timeout_s=timeout_s, max_bytes=max_bytes)
    if backend == "jax_transfer":
        from jaxlab.inference.jax_transfer import JaxTransfer

        return JaxTransfer(host=host, max_bytes=max_bytes)
    raise ValueError(f"transfer: expected one of {', '.join(BACKENDS)}, got {backend!r}")


def used_pages(pages: KVPages) -> int:
    """How many of the pages hold tokens; the others are padding."""
    return -(-pages.tokens // pages.k.shape[3])


def byte_count(pages: KVPages, count: int | None = None) -> int:
    """Bytes of the keys and values of `count` pages; None: of all."""
    whole = int(pages.k.nbytes) + int(pages.v.nbytes)
    return whole if count is None else whole // pages.k.shape[2] * count


def header_of(pages: KVPages, count: int | None = None) -> dict[str, Any]:
    """Everything about `count` pages but the arrays' contents, as JSON; None: of all."""
    fields = {field.name: getattr(pages, field.name) for field in dataclasses.fields(pages)}
    layers, heads, pages_here, size, dim = pages.k.shape
    shape = [layers, heads, pages_here if count is None else count, size, dim]
    arrays = {name: [str(np.dtype(fields.pop(name).dtype)), shape] for name in ("k", "v")}
    # The keys of a JSON object are strings.
    top_logprobs = [[list(pair) for pair in own.items()] for own in fields.pop("top_logprobs")]
    return {**fields, "top_logprobs": top_logprobs, "arrays": arrays}


def pages_of(header: Mapping[str, Any], k: Any, v: Any) -> KVPages:
    """What `header_of` took apart."""
    fields = {name: value for name, value in header.items() if name != "arrays"}
    fields["top_logprobs"] = [dict(own) for own in fields["top_logprobs"]]
    return KVPages(**fields, k=k, v=v)


def array_specs(header: Any, max_bytes: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of k and v that a peer announces.

    Raises:
        KVTransferError: it is no header, or announces more than `max_bytes`.
    """
    try:
        specs = {name: (_dtype(dtype), tuple(shape)) for name, (dtype, shape) in header["arrays"].items()}
        shapes = [shape for _, shape in specs.values()]
        good = set(specs) == {"k", "v"} and shapes[0] == shapes[1] and len(shapes[0]) == 5
        good = good and all(type(size) is int and size >= 0 for size in shapes[0])
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise KVTransferError(f"a peer sent what describes no keys and values: {error!r}") from error
    if not good:
        raise KVTransferError(f"expected k and v of one shape [L,Hkv,n,page,D], a peer sent {header['arrays']!r}")
    total = sum(dtype.itemsize * _product(shape) for dtype, shape in specs.values())
    if total > max_bytes:
        raise KVTransferError(f"a peer announces {total} bytes, expected at most {max_bytes}")
    return specs


_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8")


def _dtype(name: Any) -> np.dtype:
    import ml_dtypes

    if name not in _DTYPES:
        raise ValueError(f"dtype {name!r}")
    return np.dtype(getattr(ml_dtypes, name, name))


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:  # plain integers: a hostile shape must not wrap around
        total *= size
    return total
