"""
How parties meet: a second connection, on the server's PORT + 1, where they greet, agree on the model and notice each other's death.
"""
import json
import os
import queue
import secrets
import socket
import ssl
import sys
import threading
import time

import numpy as np

from configurator import die

ROLES = ("client", "server", "helper")
GONE = "the other party is gone (its process ended or the connection broke)"


def quit_now(message):
    """End the process from a thread, whatever C++ is waiting for in the main one."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(1)


def free_addresses(n):
    """n addresses on this machine, each with its port and the next one free, below where outgoing connections take theirs."""
    for _ in range(100):  # at random: another run may be choosing, too
        port = int(np.random.default_rng().integers(10000, 32000))
        try:
            for p in range(port, port + 2 * n):
                socket.create_server(("127.0.0.1", p)).close()
            return [f"127.0.0.1:{port + 2 * i}" for i in range(n)]
        except OSError:
            continue
    die(f"no {2 * n} free ports in a row on 127.0.0.1 between 10000 and 32000")


def tls_files(folder):
    """(ca.pem, cert.pem, key.pem) of a folder: who may sign either side's certificate, and one's own."""
    files = [os.path.join(folder, name) for name in ("ca.pem", "cert.pem", "key.pem")]
    for path in files:
        if not os.path.isfile(path):
            die(f"no {path}: --tls is a folder with ca.pem (who may sign the other side's certificate), cert.pem and key.pem", 2)
    return files


def tls_context(folder, server):
    """A mutual one: each side shows its certificate and refuses a peer whose isn't signed by ca.pem."""
    ca, cert, key = tls_files(folder)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False  # the ca is the two parties' own: whoever it signed is who they mean
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(ca)
        context.load_cert_chain(cert, key)
    except (OSError, ValueError) as e:
        die(f"can't use the certificates in {folder}: {e}", 2)
    return context


def greet(rank, addresses, mine, connect_timeout, timeout, tls=""):
    """
    Meet the other parties on the server's PORT + 1 and compare what all must agree on, the dict `mine`: exits with a line if
    one doesn't come within `connect_timeout` seconds or differs. A thread for each then watches, and ends this process with a line
    when the other's dies.

    Returns (session, farewell): a name of this run that the server drew; farewell(word): tell the others the JSON value
    `word`, and return theirs, when all have finished, or exit with a line after `timeout` seconds. The server answers last: nobody leaves while another still needs them.
    """
    host, port = addresses[1].rpartition(":")[0], int(addresses[1].rpartition(":")[2]) + 1
    context = tls_context(tls, rank == 1) if tls else None
    deadline, met, words, session = time.time() + connect_timeout, [], queue.Queue(), secrets.token_hex(8)

    def meet(sock):
        sock.settimeout(max(0.01, deadline - time.time()))
        sock = context.wrap_socket(sock, server_side=rank == 1) if context else sock
        try:
            sock.sendall(json.dumps(mine | {"session": session}).encode() + b"\n")
            lines = sock.makefile()
            met.append((sock, lines, json.loads(lines.readline())))
        except (ConnectionError, ssl.SSLEOFError, ValueError):
            if context:  # a server refuses a certificate after the client's part of the handshake is done
                raise ssl.SSLError("our certificate was not accepted") from None
            raise

    try:
        if rank == 1:
            with socket.create_server((host, port)) as server:
                came = []
                while len(came) < len(addresses) - 1:  # all of them, before the first is answered
                    server.settimeout(max(0.01, deadline - time.time()))
                    came.append(server.accept()[0])
            for sock in came:
                meet(sock)
        while not met:
            try:
                meet(socket.create_connection((host, port), timeout=2))
            except (OSError, ValueError) as e:  # not there yet, or a relay in its place
                if isinstance(e, ssl.SSLError) and not isinstance(e, ssl.SSLEOFError):
                    raise
                if time.time() > deadline:
                    raise TimeoutError from None
                time.sleep(0.2)
    except TimeoutError:
        die(f"the other party did not come to {host}:{port} within {connect_timeout} seconds: start it, or check --listen and --peer")
    except ssl.SSLError as e:
        why = e.verify_message if isinstance(e, ssl.SSLCertVerificationError) else getattr(e, "reason", None) or e
        die(f"no secure connection at {host}:{port}: {why} (both sides need --tls, and certificates that the other's ca.pem signed)")
    except (OSError, ValueError) as e:
        die(f"can't talk to the other party at {host}:{port}: {e}")
    for _, _, word in met:
        for key in mine:
            if word.get(key) != mine[key]:
                die(f"the other party has another {key}: {word.get(key, 'none')!r} against {mine[key]!r} here")

    def watch(lines):
        try:
            word = lines.readline()
        except OSError:
            word = ""
        if not word:
            quit_now(GONE)
        words.put(json.loads(word))

    for sock, lines, _ in met:
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        threading.Thread(target=watch, args=(lines,), daemon=True).start()

    def farewell(word):
        def say():
            try:
                for sock, *_ in met:
                    sock.sendall(json.dumps(word).encode() + b"\n")
            except OSError:
                quit_now(GONE)

        if rank != 1:
            say()
        try:
            said = [words.get(timeout=timeout) for _ in met]
        except queue.Empty:
            quit_now("the other party did not say that it is done")
        if rank == 1:
            say()
        return said

    return session if rank == 1 else met[0][2]["session"], farewell
