"""A real nginx."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support.cluster import until


@contextlib.contextmanager
def nginx(folder: Path, site: str) -> Iterator[None]:
    """Run nginx with this `server` block during the block."""
    assert shutil.which("nginx"), "a real nginx is needed: `apt-get install nginx` (`just test` does it where it may)"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    text = f"daemon off; pid {folder}/pid; error_log {folder}/error.log;\nevents {{}}\n"
    (folder / "nginx.conf").write_text(text + f"http {{ access_log off;\n{paths}{site}}}\n")
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            until((folder / "pid").exists, 10, "nginx has started")
            yield
        finally:
            process.terminate()
