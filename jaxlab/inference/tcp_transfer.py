"""Keys and values over TCP: the portable backend.

A worker listens; a receiver connects, once for each request. Frames, with sizes checked before memory is taken:

    sender    16 random bytes
    receiver  16 random bytes, HMAC-SHA256 of both under the secret
    sender    HMAC-SHA256 of both, other way round
    receiver  length (4 bytes, big-endian), the request's name
    sender    length, JSON header (length 0: no such offer), then the raw bytes of k and of v
    receiver  one byte: all is here

Nothing is pickled. Contents are not encrypted: use it inside a network that is trusted with prompts.
"""

import contextlib
import hmac
import json
import secrets
import socket
import struct
import threading
import time
from typing import Any

import numpy as np

from jaxlab.inference.paged import KVPages
from jaxlab.inference.transfer import KVTransferError, Offer, array_specs, byte_count, header_of, pages_of, used_pages

_NONCE, _DIGEST = 16, 32
_MAX_NAME, _MAX_HEADER = 1 << 10, 1 << 26
_MAX_PEERS = 64  # connections at a time; a further one is refused
_HANDSHAKE_S = 5.0
_RECEIVED = b"\x06"


class TcpTransfer:
    """One worker's end.

    Args:
        token: the secret of this run, at least 16 bytes; who does not know it is refused.
        host: where to listen; the default lets nobody in from outside.
        timeout_s: how long a receiver may take over one transfer.
        max_bytes: what one request may bring at most.
    """

    def __init__(self, token: bytes, *, host: str = "127.0.0.1", timeout_s: float = 30.0, max_bytes: int = 1 << 36):
        if len(token) < 16:
            raise ValueError(f"token: expected at least 16 secret bytes, got {len(token)}")
        self._token, self._timeout_s, self._max_bytes = token, timeout_s, max_bytes
        self._lock = threading.Lock()
        self._offers: dict[str, tuple[bytes, KVPages]] = {}  # with their headers
        self._sockets: set[socket.socket] = set()
        self._closed = False
        self._listener = socket.create_server((host, 0), backlog=_MAX_PEERS)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._accept, name="kv-transfer", daemon=True)
        self._thread.start()

    @property
    def held_bytes(self) -> int:
        """Of what is offered and neither received nor dropped."""
        with self._lock:
            return sum(byte_count(pages, used_pages(pages)) for _, pages in self._offers.values())

    def send(self, request_id: str, pages: KVPages) -> Offer:
        """See `KVTransfer`. The offer ends when a receiver has fetched it, or has tried to."""
        count = used_pages(pages)
        header = json.dumps(header_of(pages, count)).encode()
        with self._lock:
            self._offers[request_id] = header, pages
        return {"address": list(self.address), "bytes": byte_count(pages, count)}

    def drop(self, request_id: str, *, received: bool = False) -> None:
        """See `KVTransfer`."""
        del received
        with self._lock:
            self._offers.pop(request_id, None)

    def recv(self, request_id: str, offer: Offer, *, timeout_s: float) -> KVPages:
        """See `KVTransfer`."""
        deadline = time.monotonic() + timeout_s
        host, port = offer["address"]
        what = f"request {request_id}: its keys and values, from {host}:{port}"
        try:
            with self._known(socket.create_connection((host, port), timeout=timeout_s)) as peer:
                wire = _Wire(peer, deadline)
                self._prove(wire)
                wire.send_frame(request_id.encode())
                header = wire.receive_frame(_MAX_HEADER)
                if not header:
                    raise KVTransferError(f"{what}: not offered there")
                header = json.loads(header)
                specs = array_specs(header, min(self._max_bytes, offer["bytes"]))
                arrays = {name: np.empty(shape, dtype) for name, (dtype, shape) in specs.items()}
                for array in arrays.values():
                    wire.receive_into(_raw(array))
                wire.send(_RECEIVED)
                return pages_of(header, **arrays)
        except TimeoutError as error:
            raise KVTransferError(f"{what}: not here after {timeout_s:g} s") from error
        except OSError as error:
            raise KVTransferError(f"{what}: the peer is lost ({error})", peer_lost=True) from error
        except (ValueError, TypeError, KeyError) as error:
            raise KVTransferError(f"{what}: the peer sent something else ({error})") from error

    def close(self) -> None:
        """See `KVTransfer`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._offers.clear()
            sockets = list(self._sockets)
        for one in (self._listener, *sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in it
        self._listener.close()
        self._thread.join(5.0)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(0.05)  # out of file descriptors, or a peer that left in the queue
                continue
            with self._lock:
                full = len(self._sockets) >= _MAX_PEERS
            if full:
                peer.close()
            else:
                threading.Thread(target=self._serve, args=(peer,), name="kv-transfer-peer", daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        """Answers one receiver. Whatever goes wrong is its peer's to notice: the connection ends."""
        with contextlib.suppress(OSError, UnicodeDecodeError), self._known(peer):
            wire = _Wire(peer, time.monotonic() + min(_HANDSHAKE_S, self._timeout_s))
            self._challenge(wire)
            name = wire.receive_frame(_MAX_NAME).decode()
            wire.deadline = time.monotonic() + self._timeout_s
            with self._lock:
                header, pages = self._offers.get(name, (b"", None))
            wire.send_frame(header)
            if pages is None:
                return
            try:
                for array in (pages.k, pages.v):
                    wire.send(_raw(np.ascontiguousarray(np.asarray(array)[:, :, : used_pages(pages)])))
                wire.receive_into(memoryview(bytearray(1)))
            finally:
                self.drop(name)

    def _challenge(self, wire: "_Wire") -> None:
        nonce = secrets.token_bytes(_NONCE)
        wire.send(nonce)
        theirs = wire.receive(_NONCE + _DIGEST)
        if not hmac.compare_digest(theirs[_NONCE:], self._digest(nonce, theirs[:_NONCE])):
            raise ConnectionRefusedError("the peer does not know the secret")
        wire.send(self._digest(theirs[:_NONCE], nonce))

    def _prove(self, wire: "_Wire") -> None:
        theirs = wire.receive(_NONCE)
        nonce = secrets.token_bytes(_NONCE)
        wire.send(nonce + self._digest(theirs, nonce))
        if not hmac.compare_digest(wire.receive(_DIGEST), self._digest(nonce, theirs)):
            raise ConnectionRefusedError("it does not know the secret")

    def _digest(self, first: bytes, second: bytes) -> bytes:
        return hmac.digest(self._token, first + second, "sha256")

    @contextlib.contextmanager
    def _known(self, peer: socket.socket) -> Any:
        """An open connection, which `close` can end."""
        with peer:
            with self._lock:
                if self._closed:
                    raise ConnectionAbortedError("this end is closed")
                self._sockets.add(peer)
            try:
                yield peer
            finally:
                with self._lock:
                    self._sockets.discard(peer)


class _Wire:
    """Whole messages over a socket, none waited for beyond the deadline."""

    def __init__(self, peer: socket.socket, deadline: float):
        self._peer, self.deadline = peer, deadline
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes | memoryview) -> None:
        self._limit()
        self._peer.sendall(data)

    def send_frame(self, data: bytes) -> None:
        self.send(struct.pack(">I", len(data)) + data)

    def receive_into(self, view: memoryview) -> None:
        while len(view):
            self._limit()
            count = self._peer.recv_into(view)
            if count == 0:
                raise ConnectionResetError("it ended the connection")
            view = view[count:]

    def receive(self, size: int) -> bytes:
        data = bytearray(size)
        self.receive_into(memoryview(data))
        return bytes(data)

    def receive_frame(self, most: int) -> bytes:
        (size,) = struct.unpack(">I", self.receive(4))
        if size > most:
            raise ConnectionAbortedError(f"a frame of {size} bytes, expected at most {most}")
        return self.receive(size)

    def _limit(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._peer.settimeout(left)


def _raw(array: np.ndarray) -> memoryview:
    """An array's bytes. bfloat16 has no buffer of its own."""
    return array.reshape(-1).view(np.uint8).data
