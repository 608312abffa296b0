"""`python -m llmrun_runtime.cluster.backup backup|restore FILE`: copies this home's database and admin key.

Prints one event: `{"models": N, "keys": N, "created": UNIX_TIME}` or `{"error": TEXT}`. Imports no Ray.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from pathlib import Path

from sqlalchemy.exc import SQLAlchemyError

from llmrun.errors import BackupError, ClusterError, LLMRunError
from llmrun.settings import Settings
from llmrun_runtime.cluster.cluster_file import ClusterFile
from llmrun_runtime.cluster.local import lock_home
from llmrun_runtime.control.state.backup import Manifest, open_backup, write_backup


def back_up(settings: Settings, path: Path, *, force: bool) -> Manifest:
    """Write the home's database and admin key to `path`; a running cluster continues. Raises BackupError."""
    if path.is_dir():
        raise BackupError(f"cannot write {path}: it is a directory. Name a file in it")
    if path.exists() and not force:
        raise BackupError(f"cannot write {path}: it already exists. Choose another name, or use --force")
    return write_backup(settings.resolved_database_url(), settings.admin_key_file, path)


def restore(settings: Settings, path: Path, *, force: bool) -> Manifest:
    """Replace the home's database and admin key. Raises BackupError, also if its cluster runs or has not ended."""
    with open_backup(path) as backup:
        running = f"cannot restore: a cluster runs in {settings.root}. Stop it first: `llmrun down`"
        try:
            lock = lock_home(settings)
        except ClusterError as error:
            raise BackupError(running) from error
        with lock:
            if ClusterFile.read(settings.cluster_file):
                raise BackupError(running)
            backup.restore(settings.resolved_database_url(), settings.admin_key_file, force=force)
            return backup.manifest


def _describe(error: Exception) -> str:
    """Return an error in one line. SQLAlchemy's own text has the SQL and its values."""
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        return what + (". Free space, then repeat the command" if error.errno == errno.ENOSPC else "")
    return str(error).partition("\n")[0] + ". Check LLMRUN_DATABASE_URL, and the disk's free space"


def main() -> int:
    """Run one of the actions. Return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["backup", "restore"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--force", action="store_true")
    args = parser.parse_args()
    action = back_up if args.action == "backup" else restore
    try:
        manifest = action(Settings(), args.file, force=args.force)
    except LLMRunError as error:
        print(json.dumps({"error": str(error)}))
        return 1
    except (SQLAlchemyError, ImportError, OSError) as error:
        what = "back up" if args.action == "backup" else "restore"
        print(json.dumps({"error": f"cannot {what}: {_describe(error)}"}))
        return 1
    rows = manifest.rows
    print(json.dumps({"models": rows.get("models", 0), "keys": rows.get("keys", 0), "created": manifest.created}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
