"""How a cluster proves to a client of its own home that it is that cluster, before the client sends the admin key.

The client sends a random challenge to `/health`. The answer is an HMAC of it and of the server's port, by the sha256 of
the admin key. A stranger that listens on the port cannot make it, and one from another port cannot be relayed.
"""

from __future__ import annotations

import hashlib
import hmac

CHALLENGE_HEADER = "X-LLMRun-Challenge"
PROOF_HEADER = "X-LLMRun-Proof"
MAX_CHALLENGE = 128
# What logs and usage call the admin key.
ADMIN_NAME = "admin"


def digest_of(key: str) -> str:
    """Return a key's sha256 in hex. A key has 256 random bits, so a slow hash would not add security.

    A lookup by digest needs no constant-time comparison: its duration reveals nothing that leads to a key.
    """
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()


def prove(admin_digest: str, challenge: str, port: int) -> str:
    """Return the proof for a challenge, in hex. `admin_digest`: of the admin key, by `digest_of`."""
    return hmac.new(admin_digest.encode(), f"{challenge} {port}".encode(), "sha256").hexdigest()


def is_proof(proof: str, admin_key: str, challenge: str, port: int) -> bool:
    """Whether a server on `port` that knows the admin key's digest has made the proof."""
    expected = prove(digest_of(admin_key), challenge, port)
    return hmac.compare_digest(expected.encode(), proof.encode(errors="replace"))
