"""Run a model's whole life where every outgoing packet is seen.

`unshare -rn python -m tests.support.network_watch HOME WEIGHTS` runs in a network namespace whose only way out is a TUN
device that this process reads. It prints JSON: the destinations of all packets and, as proof that it would see one, the
destination of a packet that it sends itself at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.support.cluster import Home, free_port, write_app

# <linux/if_tun.h>, <linux/sockios.h>, <linux/if.h>
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK, IFF_UP = 0x8914, 0x8916, 0x891C, 0x1
OWN, OUTSIDE = "10.255.0.1", ("192.0.2.1", 9)
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp"}


def main() -> None:
    """Run llmrun and print the packets."""
    home, weights = Path(sys.argv[1]), Path(sys.argv[2])
    with watched() as seen:
        run_llmrun(Home(home, free_port()), weights)
        time.sleep(1)
        outside = list(seen)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", OUTSIDE)
        time.sleep(0.5)
    print(json.dumps({"seen": outside, "own": seen[len(outside) :]}))


def run_llmrun(home: Home, weights: Path) -> None:
    """Start a cluster, deploy a model, send it a request, run the commands that show state, and stop."""
    home.ok("up")
    try:
        text = f"@llm({str(weights)!r}, cpus=0.2)\nclass Quiet: ...\n"
        home.ok("deploy", write_app(home.path.parent / "quiet" / "app.py", text))
        body = {"model": "quiet", "prompt": "Hello", "max_tokens": 4}
        httpx.post(f"{home.url}/v1/completions", json=body, timeout=60).raise_for_status()
        for command in (("status",), ("usage",), ("weights", "list"), ("logs", "quiet")):
            home.ok(*command)
        time.sleep(5)  # usage is reported with a delay
    finally:
        home.ok("down")


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Record the packets that would leave this machine; yields the list, which grows during the block."""
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")  # the kernel would send router solicitations
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", b"out", IFF_TUN | IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        # All addresses, split into on-link networks: the kernel adds no route for the netmask 0.0.0.0.
        networks = [
            (f"out:{bits}".encode(), f"{256 >> bits}.255.0.1", f"{256 - (256 >> bits)}.0.0.0") for bits in range(1, 9)
        ]
        interfaces = [(b"lo", "127.0.0.1", "255.0.0.0"), (b"out", OWN, "255.0.0.0"), *networks]
        for name, address, mask in interfaces:
            for request, value in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, mask)):
                packed = struct.pack("16sHH4s16x", name, socket.AF_INET, 0, socket.inet_aton(value))
                fcntl.ioctl(control, request, packed)
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name, IFF_UP))
    seen: list[str] = []

    def read() -> None:
        while True:
            packet = os.read(tun, 65536)
            header = 4 * (packet[0] & 15)
            (port,) = struct.unpack("!H", packet[header + 2 : header + 4])
            kind = PROTOCOLS.get(packet[9], str(packet[9]))
            seen.append(f"{kind} {socket.inet_ntoa(packet[16:20])}:{port} {bytes(packet[header + 8 : header + 60])!r}")

    threading.Thread(target=read, daemon=True).start()
    yield seen


if __name__ == "__main__":
    main()
