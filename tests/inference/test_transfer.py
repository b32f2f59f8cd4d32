import contextlib
import json
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlab.inference import transfer
from jaxlab.inference.tcp_transfer import TcpTransfer
from tests.inference.transfer_peer import pages

ROOT = Path(__file__).resolve().parents[2]
SECRET = secrets.token_bytes(16)
REMOTE = ("tcp", "jax_transfer")


def equal(got, expected):
    for name in ("k", "v"):
        ours, theirs = np.asarray(getattr(got, name)), np.asarray(getattr(expected, name))
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert transfer.header_of(got) == transfer.header_of(expected)


@pytest.fixture(scope="module")
def peer():
    command = [sys.executable, "-m", "tests.inference.transfer_peer", SECRET.hex()]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def offers(peer):
    return json.loads(peer.stdout.readline())


@pytest.fixture(scope="module")
def ends():
    ends = {name: transfer.open_transfer(name, token=SECRET) for name in transfer.BACKENDS}
    yield ends
    for end in ends.values():
        end.close()


@pytest.mark.parametrize("backend", transfer.BACKENDS)
def test_within_a_process(backend, ends):
    end = ends[backend]
    sent = pages("a bf16")
    offer = end.send("1", sent)
    assert offer == json.loads(json.dumps(offer))
    assert end.held_bytes == offer["bytes"] == sent.k.nbytes + sent.v.nbytes
    equal(end.recv("1", offer, timeout_s=10), sent)
    end.drop("1", received=True)
    end.send("2", sent)
    end.drop("2")
    end.drop("2")
    assert end.held_bytes == 0


@pytest.mark.parametrize("backend", REMOTE)
def test_between_processes(backend, ends, offers):
    for name in ("f32", "a bf16"):
        equal(ends[backend].recv(name, offers[backend][name], timeout_s=20), pages(name))


@pytest.mark.parametrize("backend", REMOTE)
def test_what_was_dropped_never_comes(backend, ends, offers):
    started = time.monotonic()
    with pytest.raises(transfer.KVTransferError, match="request dropped: its keys and values"):
        ends[backend].recv("dropped", offers[backend]["dropped"], timeout_s=0.5)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("backend", REMOTE)
def test_a_lost_peer(backend, ends, offers, peer):
    peer.send_signal(signal.SIGKILL)
    peer.wait()
    started = time.monotonic()
    with pytest.raises(transfer.KVTransferError, match="the peer is lost") as error:
        ends[backend].recv("never fetched", offers[backend]["never fetched"], timeout_s=20)
    assert error.value.peer_lost
    assert time.monotonic() - started < 10


def test_a_stranger_is_refused_by_both_sides(ends):
    ours = ends["tcp"]
    with contextlib.closing(TcpTransfer(secrets.token_bytes(16))) as stranger:
        offer = ours.send("secret", pages("f32"))
        with pytest.raises(transfer.KVTransferError, match="the peer is lost"):
            stranger.recv("secret", offer, timeout_s=5)
        assert ours.held_bytes == offer["bytes"]
        with pytest.raises(transfer.KVTransferError, match="the peer is lost"):
            ours.recv("bait", stranger.send("bait", pages("f32")), timeout_s=5)
    ours.drop("secret")


def test_a_sender_that_hangs_or_babbles(ends):
    with socket.create_server(("127.0.0.1", 0)) as server:
        offer = {"address": list(server.getsockname()), "bytes": 64}
        with pytest.raises(transfer.KVTransferError, match=r"not here after 0\.2 s"):
            ends["tcp"].recv("1", offer, timeout_s=0.2)

        def babble():
            for _ in range(2):
                with server.accept()[0] as one:
                    one.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 20)

        thread = threading.Thread(target=babble)
        thread.start()
        with pytest.raises(transfer.KVTransferError, match="the peer is lost"):
            ends["tcp"].recv("1", offer, timeout_s=5)
        thread.join(5)


def test_a_receiver_that_hangs_costs_nothing(ends):
    end = ends["tcp"]
    with socket.create_connection(end.address):
        offer = end.send("1", pages("f32"))
        equal(end.recv("1", offer, timeout_s=5), pages("f32"))


def test_closing_ends_what_waits():
    end = TcpTransfer(SECRET)
    errors = []

    def wait(address):
        try:
            end.recv("1", {"address": list(address), "bytes": 64}, timeout_s=20)
        except transfer.KVTransferError as error:
            errors.append(error)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        thread = threading.Thread(target=wait, args=(silent.getsockname(),))
        thread.start()
        silent.accept()
        end.close()
        thread.join(5)
    assert len(errors) == 1
    with pytest.raises(OSError):
        socket.create_connection(end.address, timeout=1).recv(1)


@pytest.mark.parametrize(
    "header",
    [
        None,
        {"arrays": {"k": ["float32", [1, 1, 1, 1, 1]]}},
        {"arrays": {"k": ["float32", [1, 1, 1, 1, 1]], "v": ["float32", [1, 1, 1, 1, 2]]}},
        {"arrays": {"k": ["float32", [1, 1, 1, 1, -1]], "v": ["float32", [1, 1, 1, 1, -1]]}},
        {"arrays": {"k": ["float32", [1, 1, 1, 1, True]], "v": ["float32", [1, 1, 1, 1, True]]}},
        {"arrays": {"k": ["object", [1, 1, 1, 1, 1]], "v": ["object", [1, 1, 1, 1, 1]]}},
        {"arrays": {"k": ["int8", [2**62, 4, 1, 1, 1]], "v": ["int8", [2**62, 4, 1, 1, 1]]}},
    ],
)
def test_headers_that_lie(header):
    with pytest.raises(transfer.KVTransferError, match="a peer"):
        transfer.array_specs(header, 1 << 20)


def test_bad_arguments(monkeypatch):
    with pytest.raises(ValueError, match="transfer: expected one of inproc, tcp, jax_transfer, got 'nccl'"):
        transfer.open_transfer("nccl")
    with pytest.raises(ValueError, match="token: expected at least 16 secret bytes, got 0"):
        transfer.open_transfer("tcp")

    def broken(*arguments):
        raise RuntimeError("no such transport")

    monkeypatch.setattr("jax.experimental.transfer.start_transfer_server", broken)
    with pytest.raises(NotImplementedError, match=r"does not work with JAX .*no such transport; use 'tcp'"):
        transfer.open_transfer("jax_transfer")
