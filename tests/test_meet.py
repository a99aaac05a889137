"""private/meet.py: strangers, parties that differ or freeze, addresses, certificates."""
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from private.meet import LONGEST, ROLES, free_addresses, host_port, tls_context, warn_of_readers

PARTY = """
import sys
from private.meet import greet, quit_now
rank, addresses, mine, connect_timeout, timeout, tls, seconds = eval(sys.argv[1])
try:
    session, farewell = greet(rank, addresses, mine, connect_timeout, timeout, tls)
except (OSError, ValueError) as e:
    quit_now(e)
print("met", session, flush=True)
import time
time.sleep(seconds)
print("farewell", farewell({"from": rank}), flush=True)
"""


class Party:
    """A process that greets, stays for some seconds and says farewell."""

    def __init__(self, rank, addresses, mine={"model": "a"}, connect_timeout=20, timeout=20, tls="",
                 seconds=0):
        arguments = repr((rank, addresses, mine, connect_timeout, timeout, str(tls), seconds))
        self.process = subprocess.Popen([sys.executable, "-c", PARTY, arguments], cwd=ROOT,
                                        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def wait_until_met(self):
        line = self.process.stdout.readline()
        assert line.startswith("met "), line + self.process.stdout.read()

    def end(self, timeout=40):
        """(exit status, what it said)."""
        out = self.process.communicate(timeout=timeout)[0]
        return self.process.returncode, out


@pytest.fixture
def parties():
    """Makes parties, none of which survives the test."""
    made = []

    def make(*args, **kwargs):
        made.append(Party(*args, **kwargs))
        return made[-1]

    yield make
    for party in made:
        party.process.kill()
        party.process.communicate()


def knock(address, party=None):
    """
    A connection to the port where the server of `address` greets, as soon as there is one.

    None if `party`, its process, has ended.
    """
    host, port = host_port(address, "")
    until = time.time() + 30
    while time.time() < until and (party is None or party.poll() is None):
        try:
            return socket.create_connection((host, port + 1), timeout=5)
        except OSError:
            time.sleep(0.05)
    assert party and party.poll() is not None, "nobody listens"
    return None


def assert_they_met(*all_parties):
    said = [party.end() for party in all_parties]
    assert all(status == 0 for status, _ in said), said
    sessions = {out.split()[1] for _, out in said}
    assert len(sessions) == 1


GREETING = b'{"model": "a", "role": "client", "session": "0123456789abcdef"}\n'
STRANGERS = {
    "nothing": b"",
    "an empty object": b"{}\n",
    "a list": b"[1,2]\n",
    "a browser": b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    "a TLS handshake": b"\x16\x03\x01\x02\x00\x01\x00\x01",
    "an endless line": b"{" * 1_000_000,
    "deep nesting": b'{"a":' + b"[" * (LONGEST - 100) + b"\n",
    "a list for a role": GREETING.replace(b'"client"', b'["client"]'),
    "a nested value": GREETING.replace(b'"a"', b'{"a": [1]}'),
    "a path for a session": GREETING.replace(b"0123456789abcdef", b"../../../../etc/"),
    "another role": GREETING.replace(b"client", b"guest"),
    "a number too long": GREETING.replace(b'"a"', b"9" * 5000),
    "half a greeting": GREETING[:20],
    "bytes that are no text": b'{"model": "\xff\xfe"}\n',
}


def send(sock, content, slowly):
    try:
        pieces = [content[i:i + 1] for i in range(8)] if slowly else [content]
        for piece in pieces:
            sock.sendall(piece)
            time.sleep(0.2 if slowly else 0)
    except OSError:  # dropped, as it should be
        pass


def test_no_stranger_keeps_the_right_party_from_meeting(parties):
    """Each of the above, 100 random byte strings fast and slowly, a reset, silent connections."""
    c, s = free_addresses(2)
    server = parties(1, [c, s], connect_timeout=60)
    rng = random.Random(0)
    contents = [*STRANGERS.values(), *(rng.randbytes(rng.randrange(1, 300)) for _ in range(100))]
    threads, socks = [], []
    for number, content in enumerate(contents):
        socks.append(knock(s))
        threads.append(threading.Thread(target=send, args=(socks[-1], content, number % 4 == 3)))
        threads[-1].start()
        time.sleep(0.01)
    socks += [knock(s) for _ in range(20)]  # these say nothing
    reset = knock(s)
    reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    reset.close()
    assert server.process.poll() is None
    client = parties(0, [c, s], connect_timeout=60)
    assert_they_met(server, client)
    for thread in threads:
        thread.join()
    for sock in socks:
        sock.close()


@pytest.mark.parametrize("answer", STRANGERS.values(), ids=STRANGERS)
def test_a_client_goes_on_calling_until_the_right_server_answers(answer, parties):
    c, s = free_addresses(2)
    host, port = host_port(s, "")
    client = parties(0, [c, s])
    with socket.create_server((host, port + 1)) as listener:
        sock = listener.accept()[0]
        send(sock, answer, slowly=False)
        sock.close()
    assert_they_met(parties(1, [c, s]), client)


def test_strangers_do_not_move_the_deadline(parties):
    c, s = free_addresses(2)
    started = time.time()
    server = parties(1, [c, s], connect_timeout=3)
    while time.time() < started + 20 and (sock := knock(s, server.process)):
        with sock:
            send(sock, b"{", slowly=False)
            time.sleep(0.1)
    status, out = server.end()
    assert status == 1 and time.time() - started < 8
    assert out.startswith("error: the other party did not come to ") and out.count("\n") == 1


def test_the_answer_of_a_stranger_has_an_end(parties):
    """A server that sends a byte now and then holds a client no longer than --connect_timeout."""
    c, s = free_addresses(2)
    host, port = host_port(s, "")
    with socket.create_server((host, port + 1)) as listener:
        started = time.time()
        client = parties(0, [c, s], connect_timeout=2)
        sock = listener.accept()[0]
        while client.process.poll() is None and time.time() < started + 20:
            send(sock, b"{", slowly=False)
            time.sleep(0.2)
        status, out = client.end()
    assert status == 1 and time.time() - started < 8 and "did not come" in out


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0), (0, 2, 1), (2, 1, 0)])
def test_parties_meet_in_any_order_and_hear_each_others_farewell(ranks, parties):
    addresses = free_addresses(len(ranks))
    said = {}
    started = {}
    for rank in ranks:
        started[rank] = parties(rank, addresses, seconds=rank / 2)
        time.sleep(0.5)
    for rank, party in started.items():
        said[rank] = party.end()
    assert all(status == 0 for status, _ in said.values()), said
    others = [rank for rank in ranks if rank != 1]
    assert "[{'from': 1}]" in said[0][1]
    assert all(f"{{'from': {rank}}}" in said[1][1] for rank in others)


def test_they_meet_over_ipv6(parties):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    addresses = [address.replace("127.0.0.1", "[::1]") for address in free_addresses(2)]
    assert_they_met(parties(1, addresses), parties(0, addresses))


@pytest.mark.parametrize("theirs, line", [
    ({"model": "b", "windows": 0}, "the other party has another model: "),
    ({"model": "a", "windows": 1}, "the other party has another windows: "),
    ({"model": "a"}, "the other party has another windows: "),
])
def test_both_sides_name_what_differs(theirs, line, parties):
    addresses = free_addresses(2)
    server = parties(1, addresses, mine={"model": "a", "windows": 0})
    client = parties(0, addresses, mine=theirs | {"more": 1})
    for party, words in ((server, line), (client, "the other party has another ")):
        status, out = party.end()
        assert status == 1
        assert out.startswith(f"error: {words}")
        assert out.count("\n") == 1


@pytest.mark.parametrize("survivor", [0, 1])
def test_a_frozen_party_is_noticed(survivor, parties):
    addresses = free_addresses(2)
    pair = [parties(rank, addresses, timeout=3, seconds=60) for rank in (0, 1)]
    for party in pair:
        party.wait_until_met()
    pair[1 - survivor].process.send_signal(signal.SIGSTOP)
    status, out = pair[survivor].end(timeout=20)
    role = ROLES[1 - survivor]
    assert status == 1
    assert out.startswith(f"error: no sign of life from the {role} for 3 seconds (--timeout)")
    pair[1 - survivor].process.send_signal(signal.SIGCONT)
    status, out = pair[1 - survivor].end(timeout=20)
    assert status == 1 and out.startswith("error: the other party is gone")


# ------------------------------------------------------------------------------ what is given
@pytest.mark.parametrize("text, wanted", [
    ("127.0.0.1:9000", ("127.0.0.1", 9000)),
    ("server.lan:1", ("server.lan", 1)),
    ("[::1]:9000", ("::1", 9000)),
])
def test_an_address(text, wanted):
    assert host_port(text, "--peer") == wanted


@pytest.mark.parametrize("text", [
    "", "here", "here:", ":9000", "here:0", "here:65535", "here:99999999", "here:٣٣", "here:²",
    "here:-1", "here: 9", "::1:9000", "[::1]", "[]:9000", "here:1:2",
])
def test_no_address(text):
    with pytest.raises(ValueError, match="^--peer must be HOST:PORT"):
        host_port(text, "--peer")


def test_a_line_warns_of_a_secret_that_others_can_read(tmp_path, capsys):
    key = tmp_path / "key.pem"
    key.touch(0o600)
    warn_of_readers(key)
    assert capsys.readouterr().err == ""
    key.chmod(0o640)
    warn_of_readers(key)
    assert capsys.readouterr().err == f"warning: others can read {key}: chmod 600 {key}\n"


def test_a_key_that_asks_for_a_pass_phrase_is_refused(certificates, tmp_path):
    for name in ("ca.pem", "cert.pem"):
        (tmp_path / name).write_bytes((certificates / "client" / name).read_bytes())
    subprocess.run(["openssl", "pkey", "-in", certificates / "client" / "key.pem", "-aes256",
                    "-passout", "pass:x", "-out", tmp_path / "key.pem"], check=True)
    with pytest.raises(ValueError, match="key.pem asks for a pass phrase"):
        tls_context(str(tmp_path), server=False)


@pytest.mark.parametrize("server, client, line", [
    ("server", "", "--tls"), ("", "client", "--tls"),
    ("server", "stranger", "no secure connection"),
])
def test_both_sides_say_that_tls_does_not_fit(server, client, line, certificates, parties):
    addresses = free_addresses(2)
    pair = [parties(rank, addresses, tls=certificates / name if name else "", connect_timeout=3)
            for rank, name in ((1, server), (0, client))]
    for party in pair:
        status, out = party.end()
        assert status == 1
        assert line in out
        assert out.count("\n") == 1


def test_they_meet_over_tls_and_one_that_works_long_is_not_taken_for_frozen(certificates, parties):
    addresses = free_addresses(2)
    assert_they_met(parties(1, addresses, tls=certificates / "server", timeout=3, seconds=5),
                    parties(0, addresses, tls=certificates / "client", timeout=3))
