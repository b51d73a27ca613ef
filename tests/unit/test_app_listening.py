"""The address that the server takes before anything heavy happens, and descriptors for its clients; real sockets."""

from __future__ import annotations

import errno
import resource
import socket
from collections.abc import Iterator

import pytest

from app.listening import SPARE_DESCRIPTORS, CannotListen, listen, room_for

V4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))
OTHER = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.2", 0))
NOT_HERE = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))  # of documents alone (RFC 5737)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def addresses(monkeypatch: pytest.MonkeyPatch, *found: object) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **named: list(found))


def test_it_listens_and_does_not_block() -> None:
    [one] = listen("127.0.0.1", 0)
    with one, socket.create_connection(one.getsockname(), timeout=5):
        assert not one.getblocking()
        one.settimeout(5)
        one.accept()[0].close()


def test_port_0_is_one_port_on_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses(monkeypatch, V4, OTHER, V4)
    sockets = listen("both", 0)
    names = [one.getsockname() for one in sockets]
    for one in sockets:
        one.close()
    assert [address for address, _ in names] == ["127.0.0.1", "127.0.0.2"], "one of each, however often it is named"
    assert len({port for _, port in names}) == 1
    assert names[0][1] > 0


def test_a_taken_port_is_said_with_what_to_do_and_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    made: list[socket.socket] = []
    real = socket.socket

    def make(*given: int) -> socket.socket:
        made.append(real(*given))
        return made[-1]

    monkeypatch.setattr(socket, "socket", make)
    with pytest.raises(CannotListen) as raised:
        listen("127.0.0.1", taken)
    assert f"port {taken} of 127.0.0.1 is taken" in str(raised.value)
    assert "--port" in str(raised.value)
    assert made
    assert {one.fileno() for one in made} == {-1}


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 70 + ".invalid"])
def test_a_host_that_is_not_known(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    def unknown(*given: object, **named: object) -> object:
        if len(host) > 63:
            raise UnicodeError("label too long")
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(CannotListen, match=r"is not known .* choose another with --host"):
        listen(host, 0)


def test_an_address_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses(monkeypatch, NOT_HERE)
    with pytest.raises(CannotListen, match="no such address is on this machine, choose one with --host"):
        listen("192.0.2.1", 8000)


def test_of_several_addresses_those_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses(monkeypatch, NOT_HERE, V4)
    [one] = listen("some", 0)
    with one:
        assert one.getsockname()[0] == "127.0.0.1"


def test_a_kind_of_address_that_the_system_does_not_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses(monkeypatch, (999, socket.SOCK_STREAM, 0, "", ("::1", 0)), V4)
    [one] = listen("some", 0)
    one.close()
    addresses(monkeypatch, (999, socket.SOCK_STREAM, 0, "", ("::1", 0)))
    with pytest.raises(CannotListen, match="cannot be listened on"):
        listen("some", 0)


@pytest.mark.parametrize(("number", "said"), [(errno.EACCES, "is not for this user"), (errno.EIO, "cannot be")])
def test_what_else_the_system_says(monkeypatch: pytest.MonkeyPatch, number: int, said: str) -> None:
    class Refusing(socket.socket):
        def bind(self, address: object) -> None:
            raise OSError(number, "no")

    monkeypatch.setattr(socket, "socket", Refusing)
    with pytest.raises(CannotListen, match=f"port 80 of 127.0.0.1 {said}"):
        listen("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "room", "raised"),
    [
        (256, 4096, 1024, 1024, (1024 + SPARE_DESCRIPTORS, 4096)),
        (256, 512, 1024, 512 - SPARE_DESCRIPTORS, (512, 512)),
        (4096, 4096, 1024, 1024, None),
        (20, 20, 1024, 1, (20, 20)),
        (256, resource.RLIM_INFINITY, 1024, 1024, (1024 + SPARE_DESCRIPTORS, resource.RLIM_INFINITY)),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1024, 1024, None),
    ],
)
def test_descriptors_for_connections(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int, room: int, raised: tuple[int, int] | None
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, given: limits.append(given))
    assert room_for(wanted) == room
    assert limits == ([] if raised is None else [raised])
