"""
A slow link without root and without tc: TCP forwarded between two parties at a bandwidth and with a one-way delay.

    python private/relay.py --network=wan --client=HOST:9000 --client_front=127.0.0.1:9100 --server=HOST:9000 --server_front=127.0.0.1:9200

Whoever connects to server_front (the client does) reaches the server, and the other way round; each front also forwards its
next port, where bench_spu.py's parties greet. Both connections' bytes toward one party share one pipe, as on a full-duplex
line. bench_spu.py --network=wan starts one between its two processes. On SIGTERM or Ctrl-C it prints the bytes that passed as JSON.
"""
import json
import queue
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import configure, die, one_of  # noqa: E402

network = "wan"      # wan | lan
client = ""          # HOST:PORT where the client listens
server = ""          # HOST:PORT where the server listens
client_front = ""    # HOST:PORT to listen on in the client's place: the server's --peer
server_front = ""    # HOST:PORT to listen on in the server's place: the client's --peer

NETWORKS = {  # bits a second each way, seconds one way
    "lan": (1e9, 0.25e-3),   # 1 Gbps, 0.5 ms round trip
    "wan": (100e6, 40e-3),   # the paper's: 100 Mbps, 80 ms round trip
}
BACKLOG = 0.05  # seconds of traffic a pipe holds before it stops reading, as a router's buffer would fill


class Pipe:
    """One direction of the line, shared by all connections: when its last bit will have left, and the bytes that entered."""

    def __init__(self):
        self.free, self.bytes, self.lock = 0.0, 0, threading.Lock()


def pump(source, sink, pipe, bandwidth, delay):
    """Forward source to sink until it closes, each piece arriving when a line of that bandwidth and delay would bring it."""
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
        while data := source.recv(1 << 16):
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
    """Accept connections on `front` and join each to `target`: pipe `there` leads to the target, `back` from it."""
    listener = socket.create_server(front, backlog=64)

    def accept():
        while True:
            near, _ = listener.accept()
            try:
                far = socket.create_connection(target, timeout=10)
            except OSError:  # not there yet: whoever came will try again
                near.close()
                continue
            for sock in (near, far):
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for ends in ((near, far, there), (far, near, back)):
                threading.Thread(target=pump, args=(*ends, bandwidth, delay), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def host_port(text, key):
    """(host, port) of "HOST:PORT", whose next port must exist as well, or exit 2 with a line."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        die(f"{key} must be HOST:PORT, and is {text!r}", 2)
    return host, int(port)


def main():
    configure(globals())
    one_of(globals(), network=NETWORKS)
    to_client, to_server = Pipe(), Pipe()
    ends = {key: host_port(globals()[key], f"--{key}") for key in ("client", "server", "client_front", "server_front")}
    try:
        for next_port in (0, 1):
            place = {key: (host, port + next_port) for key, (host, port) in ends.items()}
            forward(place["server_front"], place["server"], to_server, to_client, *NETWORKS[network])
            forward(place["client_front"], place["client"], to_client, to_server, *NETWORKS[network])
    except OSError as e:
        die(f"can't listen on {client_front} and {server_front} and their next ports: {e}")

    def end(*_):
        print(json.dumps({"to_client": to_client.bytes, "to_server": to_server.bytes}), flush=True)
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
    print(f"relay {network}: {NETWORKS[network][0] / 1e6:.0f} Mbps each way, {2000 * NETWORKS[network][1]:g} ms round trip", flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
