"""
A slow link without root and without tc: TCP forwarded between two parties at a bandwidth and with a
one-way delay.

    python private/relay.py --network=wan --client=HOST:9000 --client_front=127.0.0.1:9100 \\
                            --server=HOST:9000 --server_front=127.0.0.1:9200

Whoever connects to server_front (the client does) reaches the server, and the other way round.
Each front also forwards its next port, where bench_spu.py's parties greet. The bytes of all
connections toward one party share one pipe, as on a full-duplex line. bench_spu.py --network=wan
has a relay of its own between its two parties. On SIGTERM or Ctrl-C this script prints the bytes
that passed as JSON.
"""
import json
import queue
import socket
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import configure, die, end_on_signals, on_signals, one_of  # noqa: E402

if __name__ == "__main__":
    end_on_signals()

from private.meet import host_port, listen_at  # noqa: E402

network = "wan"      # wan | lan
client = ""          # HOST:PORT where the client listens
server = ""          # HOST:PORT where the server listens
client_front = ""    # HOST:PORT to listen on in the client's place: the server's --peer
server_front = ""    # HOST:PORT to listen on in the server's place: the client's --peer

NETWORKS = {  # bits a second each way, seconds one way
    "lan": (1e9, 0.25e-3),   # 1 Gbps, 0.5 ms round trip
    "wan": (100e6, 40e-3),   # the paper's: 100 Mbps, 80 ms round trip
}
BACKLOG = 0.05   # seconds of traffic a pipe holds before it stops reading, as a full router does
PIECE = 1 << 16  # bytes read at a time
DIAL = 10        # seconds to reach a party


class Pipe:
    """One direction of the line, shared by all connections."""

    def __init__(self):
        self.free = 0.0  # when its last bit will have left
        self.bytes = 0   # that entered
        self.lock = threading.Lock()


def pump(source, sink, pipe, bandwidth, delay):
    """
    Forward source to sink until it closes, each piece arriving when a line of that bandwidth (bits
    a second) and delay (seconds) would bring it.
    """
    pieces = queue.Queue()

    def deliver():
        try:
            while piece := pieces.get():
                time.sleep(max(0.0, piece[0] - time.monotonic()))
                sink.sendall(piece[1])
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # the receiver is gone: let the sender notice, and pump() with it
            with suppress(OSError):
                source.shutdown(socket.SHUT_RDWR)

    threading.Thread(target=deliver, daemon=True).start()
    try:
        while data := source.recv(PIECE):
            with pipe.lock:
                pipe.free = max(pipe.free, time.monotonic()) + 8 * len(data) / bandwidth
                pipe.bytes += len(data)
                leaves = pipe.free
            pieces.put((leaves + delay, data))
            time.sleep(max(0.0, leaves - time.monotonic() - BACKLOG))
    except OSError:
        pass
    pieces.put(None)


def forward(front, target, there, back, bandwidth, delay):
    """
    Accept connections at `front` and join each to `target`: pipe `there` leads to the target,
    `back` from it. Returns the listening socket, whose shutdown ends that.
    """
    listener = listen_at(*front)

    def accept():
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(target, timeout=DIAL)
            except OSError:  # not there yet: whoever came will try again
                near.close()
                continue
            for sock in (near, far):
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for ends in ((near, far, there), (far, near, back)):
                threading.Thread(target=pump, args=(*ends, bandwidth, delay), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listener


@contextmanager
def relay(network, client, server, client_front, server_front):
    """
    A line of NETWORKS between two parties, each (host, port), while the context lasts. Yields its
    two Pipes, to the client and to the server. OSError if a front can't be listened at.
    """
    to_client, to_server = Pipe(), Pipe()
    with ExitStack() as stack:
        for step in (0, 1):  # the port of the engine's link, and the next one
            for front, target, there, back in ((server_front, server, to_server, to_client),
                                               (client_front, client, to_client, to_server)):
                ends = [(host, port + step) for host, port in (front, target)]
                listener = forward(*ends, there, back, *NETWORKS[network])
                stack.enter_context(listener)
                stack.callback(listener.shutdown, socket.SHUT_RDWR)  # wakes the thread that accepts
        yield to_client, to_server


def main():
    configure(globals())
    one_of(globals(), network=NETWORKS)
    done = threading.Event()
    on_signals(lambda number, frame: done.set())
    keys = ("client", "server", "client_front", "server_front")
    bandwidth, delay = NETWORKS[network]
    try:
        ends = [host_port(globals()[key], f"--{key}") for key in keys]
        with relay(network, *ends) as (to_client, to_server):
            print(f"relay {network}: {bandwidth / 1e6:.0f} Mbps each way, "
                  f"{1e3 * 2 * delay:g} ms round trip", flush=True)
            done.wait()
            passed = {"to_client": to_client.bytes, "to_server": to_server.bytes}
            print(json.dumps(passed), flush=True)
    except ValueError as e:
        die(e, 2)
    except OSError as e:
        die(e)


if __name__ == "__main__":
    main()
