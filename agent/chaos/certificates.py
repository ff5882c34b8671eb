"""Certificates of the world: an authority of its own, and what it signs for the payment provider.

Used by `agent.chaos.world` and its tests. Made anew for each world by the `openssl` command, in the world's directory;
nothing of it is trusted by anybody but the shop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from agent.demo.children import run_to_end

KEY = ("ecparam", "-name", "prime256v1", "-genkey", "-noout")


@dataclass(frozen=True)
class Certificates:
    """PEM files: the authority's certificate; and with their keys one that is valid, one renewed in time, and one that
    expired yesterday."""

    authority: Path
    valid: Path
    renewed: Path
    expired: Path


async def make(place: Path, name: str) -> Certificates:
    """For the host `name`. Raises WorldError."""
    made = Certificates(*(place / f"{n}.pem" for n in ("authority", "valid", "renewed", "expired")))
    key = place / "authority.key"
    await _openssl(*KEY, "-out", str(key))
    await _openssl(
        *("req", "-x509", "-new", "-key", str(key), "-subj", "/CN=the shop's authority", "-days", "30"),
        *("-out", str(made.authority)),
    )
    extension = place / "extension.cnf"
    extension.write_text(f"subjectAltName=DNS:{name}\n")
    for file, days in ((made.valid, 2), (made.renewed, 90), (made.expired, -1)):
        own, request, bare = (place / f"{file.stem}.{kind}" for kind in ("key", "csr", "crt"))
        await _openssl(*KEY, "-out", str(own))
        await _openssl("req", "-new", "-key", str(own), "-subj", f"/CN={name}", "-out", str(request))
        await _openssl(
            *("x509", "-req", "-in", str(request), "-CA", str(made.authority), "-CAkey", str(key), "-CAcreateserial"),
            *("-days", str(days), "-extfile", str(extension), "-out", str(bare)),
        )
        file.write_text(bare.read_text() + own.read_text())
    return made


async def _openssl(*arguments: str) -> None:
    await run_to_end("openssl", "openssl", *arguments)
