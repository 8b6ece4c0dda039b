"""Certificates of an authority of our own, in files as users have them."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Pem:
    """A certificate chain and its key."""

    cert: str
    key: str


class Authority:
    """Signs certificates into a folder; `ca` is its own."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._ca, self._folder = trustme.CA(), folder
        self.ca = str(folder / f"{name}.pem")
        self._ca.cert_pem.write_to_path(self.ca)

    def issue(self, *names: str, file: str = "server", days: int = 30) -> Pem:
        """A certificate for host names or addresses; with negative days it has expired."""
        end = dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
        issued = self._ca.issue_cert(*names, not_after=end)
        pem = Pem(str(self._folder / f"{file}.pem"), str(self._folder / f"{file}.key"))
        Path(pem.cert).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        Path(pem.key).touch(0o600)
        issued.private_key_pem.write_to_path(pem.key)
        return pem


def write_tokens(path: Path, *lines: str) -> str:
    """A token file that only its owner may read."""
    path.touch(0o600)
    path.write_text("\n".join(lines) + "\n")
    return str(path)
