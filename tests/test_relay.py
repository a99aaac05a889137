"""relay.py: what a link's bandwidth and delay do to a transfer, timed."""
import json
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, run

from private.meet import free_addresses, host_port
from private.relay import NETWORKS


@pytest.mark.parametrize("network, megabytes", [("wan", 4), ("lan", 32)])
def test_a_transfer_takes_its_time(network, megabytes):
    """
    The client sends bytes through the relay and the server answers one: that takes a round trip,
    and the bytes over the bandwidth.
    """
    bandwidth, delay = NETWORKS[network]
    keys = ("client", "server", "client_front", "server_front")
    places = dict(zip(keys, free_addresses(4)))
    arguments = [f"--{key}={place}" for key, place in places.items()]
    listener = socket.create_server(host_port(places["server"], "server"))
    relay = subprocess.Popen([sys.executable, ROOT / "private/relay.py", f"--network={network}",
                              *arguments], stdout=subprocess.PIPE, text=True)
    assert relay.stdout.readline().startswith(f"relay {network}: ")
    near = socket.create_connection(host_port(places["server_front"], "server_front"))
    far, _ = listener.accept()

    def exchange(size):
        """Seconds from the first byte sent until the answer to all of them."""
        def answer():
            left = size
            while left:
                left -= len(far.recv(min(left, 1 << 16)))
            far.sendall(b"!")

        thread = threading.Thread(target=answer)
        thread.start()
        start = time.monotonic()
        near.sendall(bytes(size))
        assert near.recv(1) == b"!"
        thread.join()
        return time.monotonic() - start

    trips = [exchange(1) for _ in range(5)]
    assert 2 * delay <= min(trips) < 1.1 * 2 * delay + 2e-3, trips
    size = megabytes * 1_000_000
    seconds = exchange(size)
    wanted = 8 * size / bandwidth + 2 * delay
    assert 0.98 * wanted < seconds < 1.5 * wanted, (seconds, wanted)
    near.close()
    relay.terminate()
    assert json.loads(relay.communicate(timeout=10)[0]) == {"to_client": 6, "to_server": size + 5}


def test_one_line_says_what_is_wrong():
    assert "network must be one of lan, wan" in run("private/relay.py", "--network=moon", status=2)
    assert "--client must be HOST:PORT" in run("private/relay.py", "--client=here", status=2)
