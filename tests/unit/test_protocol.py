"""Messages over a socket: whole ones, several at once, and the end."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator

import pytest

from pytest_llmload.system.protocol import Channel, Closed


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield Channel(ours), theirs
    ours.close()
    theirs.close()


def packed(message: dict[str, object]) -> bytes:
    body = json.dumps(message).encode()
    return struct.pack("!Q", len(body)) + body


def test_messages_that_arrive_together_are_told(ends: tuple[Channel, socket.socket]) -> None:
    """A reader that waits for the socket would wait for ever for the second one."""
    channel, peer = ends
    peer.sendall(
        packed({"kind": "value", "n": 1}) + packed({"kind": "value", "n": 2}) + packed({"kind": "value", "n": 3})[:-1]
    )
    assert channel.receive()[0] == {"kind": "value", "n": 1}
    assert channel.has_message
    assert channel.receive()[0] == {"kind": "value", "n": 2}
    assert not channel.has_message
    peer.sendall(packed({"kind": "value", "n": 3})[-1:])
    assert channel.receive()[0] == {"kind": "value", "n": 3}
    assert not channel.has_message


def test_a_wait_that_times_out_loses_nothing(ends: tuple[Channel, socket.socket]) -> None:
    channel, peer = ends
    peer.sendall(packed({"kind": "value", "n": 1})[:9])
    with pytest.raises(TimeoutError):
        channel.receive(timeout=0.01)
    peer.sendall(packed({"kind": "value", "n": 1})[9:])
    assert channel.receive() == ({"kind": "value", "n": 1}, [])
    peer.close()
    with pytest.raises(Closed):
        channel.receive()
