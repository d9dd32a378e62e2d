"""A certificate of this machine's loopback address, which no client trusts until it is told to."""

from __future__ import annotations

import subprocess
from pathlib import Path

HOST = "127.0.0.1"


def certificate(folder: Path) -> tuple[Path, Path]:
    """Return a self-signed certificate and its key, made in the folder."""
    file, key = folder / "certificate.pem", folder / "key.pem"
    if not file.exists():
        request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={HOST}"]
        request += ["-addext", f"subjectAltName=IP:{HOST}", "-keyout", str(key), "-out", str(file)]
        subprocess.run(request, check=True, capture_output=True)
    return file, key
