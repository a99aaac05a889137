"""
How parties meet: a second connection, on the server's PORT + 1, where they greet, agree on model
and code, and from then on show each other every second that they live.

Anybody may knock at that port. A connection counts as a party's once it has sent a whole greeting,
a JSON object of few bytes in a short time. Every other is closed without a word, and the wait for
the right one goes on until its deadline.
"""
import json
import os
import queue
import random
import re
import secrets
import socket
import ssl
import stat
import sys
import threading
import time
from contextlib import ExitStack, suppress

ROLES = ("client", "server", "helper")  # by rank
GONE = "the other party is gone (its process ended or the connection broke)"
TLS_RECORDS = (b"\x15", b"\x16")  # the first byte of TLS's alerts and handshakes
SIGN_OF_LIFE = b"\n"
NO_GREETING = "whoever was there sent no greeting"

PORTS = 10000, 32000  # below those that outgoing connections take
LONGEST = 1 << 14  # bytes of a greeting or a last word, which take less than a thousand
STRANGER = 5.0     # seconds that whoever connects has for a whole greeting
CROWD = 100        # threads at a time; who comes beyond them may try again
CALL = 2.0         # seconds that an attempt to connect may take
RETRY = 0.2        # seconds between two attempts to connect
TICK = 0.1         # seconds that a wait takes before it looks at something else
BEAT = 1.0         # seconds between two signs of life
ENDING = threading.Lock()


def end_now(line, status, mid_line=False):
    """
    End the process with one line, whatever C++ is waiting for in the main thread. mid_line: a line
    of text may not have ended yet.
    """
    ENDING.acquire()  # and never release: a second thread's line would only confuse
    before = "\n" if mid_line else ""
    # In one write: print() may take two, between which another party's line may come.
    sys.stderr.write(before + " ".join(line.splitlines()) + "\n")
    sys.stderr.flush()
    os._exit(status)


def quit_now(message):
    end_now(f"error: {message}", 1)


def warn_of_readers(path):
    """One line on stderr if other users of this machine can read a secret."""
    if os.stat(path).st_mode & (stat.S_IRGRP | stat.S_IROTH):
        print(f"warning: others can read {path}: chmod 600 {path}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------ addresses
def host_port(text, key):
    """(host, port) of "HOST:PORT" or "[IPv6]:PORT", a port that has a next one. ValueError else."""
    match = re.fullmatch(r"(\[[^\[\]]+\]|[^:\[\]]+):([0-9]{1,5})", text)
    if not match or not 0 < int(match[2]) < 65535:
        raise ValueError(f"{key} must be HOST:PORT or [IPv6]:PORT, and is {text!r}")
    return match[1].strip("[]"), int(match[2])


def listen_at(host, port):
    """A listening socket, IPv4 or IPv6 as the host has it. OSError names the address."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=CROWD)
    except OSError as e:
        raise OSError(f"can't listen on {host}:{port}: {e}") from e


def free_addresses(n):
    """n addresses on this machine, where each port and its next one are free."""
    for _ in range(100):  # at random, since another run may be choosing as well
        first = random.SystemRandom().randrange(*PORTS)
        try:
            for port in range(first, first + 2 * n):
                listen_at("127.0.0.1", port).close()
            return [f"127.0.0.1:{first + 2 * i}" for i in range(n)]
        except OSError:
            continue
    raise OSError(f"no {2 * n} free ports in a row on 127.0.0.1 between {PORTS[0]} and {PORTS[1]}")


# ------------------------------------------------------------------------------ TLS
def tls_files(folder):
    """
    (ca.pem, cert.pem, key.pem) of a folder: who may sign either side's certificate, and one's own.
    ValueError if one is missing.
    """
    files = [os.path.join(folder, name) for name in ("ca.pem", "cert.pem", "key.pem")]
    for path in files:
        if not os.path.isfile(path):
            raise ValueError(f"no {path}: --tls is a folder with ca.pem (who may sign the other "
                             "side's certificate), cert.pem and key.pem")
    return files


def tls_context(folder, server):
    """
    A mutual one: each side shows its certificate and refuses a peer whose isn't signed by ca.pem.
    ValueError if a file is of no use.
    """
    ca, cert, key = tls_files(folder)
    with open(key, "rb") as f:
        if b"ENCRYPTED" in f.read():
            raise ValueError(f"{key} asks for a pass phrase, which nobody is there to type: "
                             f"openssl pkey -in {key} prints the key without")
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # the authority is the parties' own, and signs nobody else
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(ca)
        context.load_cert_chain(cert, key)
    except (OSError, ValueError) as e:
        raise ValueError(f"can't use the certificates in {folder}: {e}") from e
    return context


# ------------------------------------------------------------------------------ the greeting
def left_until(deadline):
    """Seconds left, for a socket's timeout. TimeoutError if there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("too late")
    return left


def read_greeting(sock, roles, deadline):
    """
    A party's greeting: a line with a JSON object of plain values, from one of `roles`. OSError or
    ValueError if something else or nothing comes, RecursionError if the JSON is nested too deep.
    """
    line = b""
    while not line.endswith(b"\n"):
        sock.settimeout(left_until(deadline))
        byte = sock.recv(1)
        if not byte:
            raise ConnectionResetError
        line += byte
        if line[:1] in TLS_RECORDS:
            raise ValueError("whoever was there uses --tls: both sides must, or neither")
        if line[:1] != b"{" or len(line) > LONGEST:
            raise ValueError(NO_GREETING)
    word = json.loads(line)
    plain = all(type(value) in (str, int, bool) for value in word.values())
    if not plain or not re.fullmatch("[0-9a-f]{16}", str(word.get("session"))):
        raise ValueError(NO_GREETING)
    if word.get("role") not in roles:
        raise ValueError(f"whoever was there is no {' or '.join(roles)}")
    return word


def why_not(error, tls):
    """The reason in an error that ended an attempt to meet, or "" if there was nobody to meet."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"no secure connection: {error.verify_message}"
    if isinstance(error, (ssl.SSLError, ConnectionResetError, BrokenPipeError)):
        if tls:
            return "no secure connection: only one side has --tls, or our certificate was refused"
        return "whoever was there hung up: has only one side --tls?"
    if type(error) is ValueError:  # and no JSONDecodeError
        return str(error)
    return ""


def take_in(listener, roles, context, deadline):
    """
    The server's side: {role: (socket, greeting)} when one of each role has greeted. TimeoutError
    with the reason why the last stranger was none.
    """
    came = queue.SimpleQueue()
    reasons = [""]

    def hear(sock):
        until = min(deadline, time.monotonic() + STRANGER)
        try:
            sock.settimeout(left_until(until))
            if context:
                sock = context.wrap_socket(sock, server_side=True)
            word = read_greeting(sock, roles, until)
            sock.settimeout(STRANGER)
            came.put((sock, word))
        except (OSError, ValueError, RecursionError) as e:
            reasons.append(why_not(e, context) or reasons[-1])
            sock.close()

    met = {}
    listener.settimeout(TICK)
    while len(met) < len(roles):
        if time.monotonic() > deadline:
            raise TimeoutError(reasons[-1])
        try:
            sock = listener.accept()[0]
            if threading.active_count() < CROWD:
                threading.Thread(target=hear, args=(sock,), daemon=True).start()
            else:
                sock.close()
        except OSError:  # nobody in this tick, or gone again
            pass
        while not came.empty():
            sock, word = came.get()
            met[word["role"]] = sock, word  # a party that was started again takes its own place
    return met


def call(address, greeting, context, deadline):
    """
    The client's and the helper's side: greet the server until it answers, {"server": (socket,
    greeting)}. TimeoutError with the reason why the last one there was no server.
    """
    reason = ""
    while time.monotonic() < deadline:
        with ExitStack() as undo:
            try:
                patience = min(CALL, left_until(deadline))
                sock = undo.enter_context(socket.create_connection(address, timeout=patience))
                if context:
                    sock = undo.enter_context(context.wrap_socket(sock))
                sock.sendall(greeting)
                word = read_greeting(sock, ["server"], deadline)
                undo.pop_all()
                return {"server": (sock, word)}
            except (OSError, ValueError, RecursionError) as e:  # not there yet, or somebody else is
                reason = why_not(e, context) or reason
        time.sleep(RETRY)
    raise TimeoutError(reason)


def greet(rank, addresses, mine, connect_timeout, timeout, tls=""):
    """
    Meet the other parties on the server's PORT + 1 and compare what all must agree on, the dict
    `mine` of plain values. OSError if one doesn't come within `connect_timeout` seconds,
    ValueError if one differs. From then on this process ends with a line when another dies, or
    gives no sign of life for `timeout` seconds. addresses: "HOST:PORT" by rank; tls: a folder, see
    tls_files(), or "".

    Returns (session, farewell): a name of this run that the server drew; farewell(word): tell the
    others the dict `word` and return theirs, when all have finished. The server answers last, so
    that nobody leaves while another still needs it.
    """
    host, port = host_port(addresses[1], "the server's address")
    session = secrets.token_hex(8)
    greeting = json.dumps(mine | {"role": ROLES[rank], "session": session}).encode() + b"\n"
    context = tls_context(tls, rank == 1) if tls else None
    deadline = time.monotonic() + connect_timeout
    try:
        if rank == 1:
            with listen_at(host, port + 1) as listener:
                others = [role for role in ROLES[:len(addresses)] if role != "server"]
                met = take_in(listener, others, context, deadline)
            for sock, _ in met.values():  # all have come before the first is answered
                with suppress(OSError):  # gone already, as its Line will find
                    sock.sendall(greeting)
        else:
            met = call((host, port + 1), greeting, context, deadline)
            session = met["server"][1]["session"]
    except TimeoutError as e:
        cure = str(e) or "start it, check --listen and --peer, or raise --connect_timeout"
        raise OSError(f"the other party did not come to {host}:{port + 1} within {connect_timeout} "
                      f"seconds: {cure}") from None
    for _, theirs in met.values():
        agree(mine, theirs)
    lines = [Line(role, sock, timeout) for role, (sock, _) in met.items()]

    def farewell(word):
        if rank != 1:
            lines[0].say(word)
        others = [line.heard.get() for line in lines]
        if rank == 1:
            for line in lines:
                line.say(word)
        return others

    return session, farewell


def agree(mine, theirs):
    """ValueError with a sentence unless the other's greeting has all that is in `mine`."""
    for key, value in mine.items():
        other = theirs.get(key, "none")
        if other != value:
            raise ValueError(f"the other party has another {key}: {str(other)[:64]!r} "
                             f"against {value!r} here")


class Line(threading.Thread):
    """
    The connection with one other party from the greeting to the farewell. This thread alone reads
    and writes it, since TLS bears no second one. say(dict) returns when the farewell has left; the
    queue `heard` gets the other's.
    """

    def __init__(self, role, sock, timeout):
        super().__init__(daemon=True)
        self.role, self.sock, self.timeout = role, sock, timeout
        self.word = b""
        self.said = threading.Event()
        self.heard = queue.SimpleQueue()
        self.start()

    def say(self, word):
        self.word = json.dumps(word).encode() + b"\n"
        self.said.wait()

    def run(self):
        try:
            self.watch()
        except (OSError, ValueError, RecursionError):
            quit_now(GONE)

    def watch(self):
        """
        Show signs of life and look for the other's, until both have said farewell. OSError or
        ValueError if the connection breaks.
        """
        self.sock.settimeout(TICK)
        shown = seen = time.monotonic()
        came = b""
        theirs = None
        while theirs is None or not self.said.is_set():
            if self.word and not self.said.is_set():
                self.sock.sendall(self.word)
                self.said.set()
            elif time.monotonic() - shown > BEAT:
                self.sock.sendall(SIGN_OF_LIFE)
                shown = time.monotonic()
            if theirs is not None:  # nothing more will come
                time.sleep(TICK)
                continue
            try:
                piece = self.sock.recv(LONGEST)
            except TimeoutError:
                if time.monotonic() - seen > self.timeout:
                    quit_now(f"no sign of life from the {self.role} for {self.timeout} seconds "
                             "(--timeout): it stands still, or the network is down")
                continue
            if not piece or len(came) > LONGEST:
                raise ConnectionResetError
            seen = time.monotonic()
            came = (came + piece).lstrip(SIGN_OF_LIFE)
            if came.endswith(b"\n"):
                theirs = json.loads(came)
                self.heard.put(theirs)
