"""Where the ingresses listen, with which certificate, and from where the admin API can be reached."""

from __future__ import annotations

import argparse
import ssl
from dataclasses import dataclass, fields

from llmrun.errors import ClusterError

EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class Listening:
    """The options of `llmrun up` that are about the ingresses' socket."""

    host: str = "127.0.0.1"
    port: int = 8000
    insecure: bool = False
    """Whether requests from other machines are accepted without API keys."""
    admin_host: str = ""
    """The address at which the admin API can be reached from other machines; "" for none."""
    tls_cert: str = ""
    """The path of a PEM file with the certificate and its chain; "" for plain HTTP."""
    tls_key: str = ""
    """The path of the PEM file with its key; "" if it is in the same file."""

    @property
    def url(self) -> str:
        """The URL at which clients on this machine reach the ingresses."""
        host = "127.0.0.1" if self.host in (*EVERYWHERE, "localhost") else self.host
        scheme = "https" if self.tls_cert else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add an option for each field."""
        for field in fields(Listening):
            option = "--" + field.name.replace("_", "-")
            if isinstance(field.default, bool):
                parser.add_argument(option, action="store_true")
            else:
                parser.add_argument(option, type=type(field.default), default=field.default)

    @classmethod
    def of(cls, args: argparse.Namespace) -> Listening:
        """Read the options."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    def arguments(self) -> list[str]:
        """Return the options for another process."""
        args: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                option = "--" + field.name.replace("_", "-")
                args += [option] if value is True else [option, str(value)]
        return args

    def tls(self) -> ssl.SSLContext | None:
        """Return a context with the certificate; None for plain HTTP. Raises ClusterError."""
        if not self.tls_cert:
            if self.tls_key:
                raise ClusterError("--tls-key has no certificate: set --tls-cert, too")
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load_certificate(context)
        return context

    def load_certificate(self, context: ssl.SSLContext) -> None:
        """Have new connections use what the files contain now. Raises ClusterError."""
        try:
            # A key with a passphrase is an error: nobody is there to type it.
            context.load_cert_chain(self.tls_cert, self.tls_key or None, password=lambda: "")
        except ssl.SSLError as error:  # an OSError, whose text has the library's codes and file names
            raise self._unusable(error.reason or "not in PEM format") from error
        except OSError as error:
            raise self._unusable(error.strerror or str(error)) from error

    def _unusable(self, cause: str) -> ClusterError:
        files = self.tls_cert + (f" with the key {self.tls_key}" if self.tls_key else "")
        return ClusterError(
            f"cannot use the certificate {files}: {cause.lower().replace('_', ' ')}. Both files must be PEM, and the "
            f"key must be that of the first certificate, without a passphrase"
        )
