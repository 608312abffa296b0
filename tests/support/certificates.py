"""Certificates for tests of TLS."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


@dataclass(frozen=True)
class Authority:
    """An authority, whose certificate is in a file."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    file: Path

    @classmethod
    def create(cls, folder: Path) -> Authority:
        """Create one."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _signed(_builder("an authority", key).add_extension(x509.BasicConstraints(True, None), True), key)
        return cls(certificate, key, _write(folder / "authority.pem", certificate))

    def issue(self, name: str, cert: Path, key_file: Path) -> bytes:
        """Write a certificate for a name, and its key; return the certificate in DER."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(name, key).issuer_name(self.certificate.subject)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), False)
        certificate = _signed(builder, self.key)
        pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        key_file.write_bytes(key.private_bytes(*pem))
        _write(cert, certificate)
        return certificate.public_bytes(serialization.Encoding.DER)


def _builder(name: str, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now, who = datetime.datetime.now(datetime.UTC), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = x509.CertificateBuilder().subject_name(who).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    day = datetime.timedelta(days=1)
    return builder.not_valid_before(now - day).not_valid_after(now + day)


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    if builder._issuer_name is None:
        assert builder._subject_name
        builder = builder.issuer_name(builder._subject_name)
    return builder.sign(key, hashes.SHA256())


def _write(path: Path, certificate: x509.Certificate) -> Path:
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path
