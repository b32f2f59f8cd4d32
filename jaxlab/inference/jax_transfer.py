"""Keys and values by `jax.experimental.transfer`: from device to device, without a copy through Python.

The module is experimental, so it is tried before use. What it does not do is done here: a fetch waits with a limit of
its own, and an offer that nobody fetches is freed by fetching it ourselves. Its server asks nobody for a secret: what
guards an offer is its random 63-bit number, so bind it only where nobody hostile reaches.
"""

import contextlib
import secrets
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab.inference.paged import KVPages
from jaxlab.inference.transfer import KVTransferError, Offer, array_specs, byte_count, header_of, pages_of

_TRIAL_S = 10.0


class JaxTransfer:
    """One worker's end, on JAX's first local device.

    Args:
        host: where to listen; the default lets nobody in from outside.
        max_bytes: what one request may bring at most.

    Raises:
        NotImplementedError: this JAX or device cannot do it, with the reason; "tcp" always can.
    """

    def __init__(self, *, host: str = "127.0.0.1", max_bytes: int = 1 << 36):
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._offers: dict[str, tuple[int, Any, int]] = {}  # number, what to pull, bytes
        self._connections: dict[str, Any] = {}
        self._closed = False
        self._sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        try:
            from jax.experimental import transfer

            device = jax.local_devices()[0]
            self._server: Any = transfer.start_transfer_server(device.client, f"{host}:0", [f"{host}:0"])
            self.address: str = self._server.address()
            trial = jax.device_put(jnp.arange(3), self._sharding)
            self._server.await_pull(0, [trial])
            (back,) = self._fetch(self.address, 0, [self._spec(trial.shape, trial.dtype)], _TRIAL_S)
            if back.tolist() != [0, 1, 2]:
                raise RuntimeError(f"a trial array came back as {back}")
        except Exception as error:
            raise NotImplementedError(
                f"transfer 'jax_transfer' does not work with JAX {jax.__version__} on {jax.default_backend()}: "
                f"{error}; use 'tcp'"
            ) from error

    @property
    def held_bytes(self) -> int:
        """Of what is offered and neither received nor dropped."""
        with self._lock:
            return sum(size for *_, size in self._offers.values())

    def send(self, request_id: str, pages: KVPages) -> Offer:
        """See `KVTransfer`. The offer lasts until `drop`."""
        number = secrets.randbits(62) + 1
        arrays = jax.device_put([jnp.asarray(pages.k), jnp.asarray(pages.v)], self._sharding)
        self._server.await_pull(number, arrays)
        specs = [self._spec(array.shape, array.dtype) for array in arrays]
        with self._lock:
            self._offers[request_id] = number, specs, byte_count(pages)
        header = header_of(pages)
        return {"address": self.address, "number": number, "header": header, "bytes": byte_count(pages)}

    def recv(self, request_id: str, offer: Offer, *, timeout_s: float) -> KVPages:
        """See `KVTransfer`."""
        what = f"request {request_id}: its keys and values, from {offer['address']}"
        specs = array_specs(offer["header"], min(self._max_bytes, offer["bytes"]))
        wanted = [self._spec(shape, dtype) for dtype, shape in (specs["k"], specs["v"])]
        try:
            k, v = self._fetch(offer["address"], offer["number"], wanted, timeout_s)
        except TimeoutError as error:
            raise KVTransferError(f"{what}: not here after {timeout_s:g} s") from error
        except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError
            with self._lock:
                self._connections.pop(offer["address"], None)
            raise KVTransferError(f"{what}: the peer is lost ({error})", peer_lost=True) from error
        return pages_of(offer["header"], k, v)

    def drop(self, request_id: str, *, received: bool = False) -> None:
        """See `KVTransfer`."""
        with self._lock:
            number, specs, _ = self._offers.pop(request_id, (None, None, 0))
        if number is not None and not received:
            # The server has no way to take an offer back. Whoever asks later waits in vain, and gives up in time.
            with contextlib.suppress(RuntimeError):
                self._connection(self.address).pull(number, specs)

    def close(self) -> None:
        """See `KVTransfer`."""
        self._closed = True
        with self._lock:
            names = list(self._offers)
        for name in names:
            self.drop(name)
        self._connections.clear()
        self._server = None

    def _fetch(self, address: str, number: int, specs: Any, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        arrays = self._connection(address).pull(number, specs)
        pause = 1e-4
        while not all(array.is_ready() for array in arrays):  # blocking until ready could not be left
            if self._closed:
                raise RuntimeError("this end is closed")
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
        return jax.block_until_ready(arrays)

    def _connection(self, address: str) -> Any:
        with self._lock:
            if address not in self._connections:
                self._connections[address] = self._server.connect(address)
            return self._connections[address]

    def _spec(self, shape: Any, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding)
