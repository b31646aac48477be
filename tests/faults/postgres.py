"""A PostgreSQL server of our own, where its programs are installed."""

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
from glob import glob
from pathlib import Path

BINARIES = max(
    glob("/usr/lib/postgresql/*/bin"),
    default=str(Path(shutil.which("initdb") or "/nowhere/initdb").parent),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def lacking() -> str:
    """Why there can be no PostgreSQL here; empty where there can."""
    if not Path(BINARIES, "initdb").exists():
        return "PostgreSQL's initdb is not installed here"
    return "" if importlib.util.find_spec("psycopg2") else "needs psycopg2-binary"


class Postgres:
    """A server of our own, on 127.0.0.1, with a password; initdb refuses root, so root hands over to `nobody`."""

    def __init__(self, root: Path):
        self.folder = root / "data"
        self.port = free_port()
        self.user = {}
        if os.getuid() == 0:
            group = pwd.getpwnam("nobody").pw_gid
            self.user = {"user": "nobody", "group": group, "extra_groups": []}
        secret = root / "secret"
        secret.write_text("se:cret")
        for place in (root, secret):
            if self.user:
                shutil.chown(place, "nobody")
        authentication = ("--auth=scram-sha-256", f"--pwfile={secret}", "--no-sync")
        self._call("initdb", "-D", self.folder, "-U", "ablab", *authentication)
        self.log = root / "log"
        self.start()
        self.url = self.url_of("postgres")

    def url_of(self, database: str) -> str:
        return f"postgresql+psycopg2://ablab:se%3Acret@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        self._call("pg_ctl", "-D", self.folder, "-w", "-l", self.log, "-o", options, "start")

    def stop(self) -> None:
        """At once, as a crash would."""
        self._call("pg_ctl", "-D", self.folder, "-m", "immediate", "stop")

    def create(self, database: str) -> None:
        import psycopg2

        told = {"host": "127.0.0.1", "port": self.port, "user": "ablab", "password": "se:cret"}
        connection = psycopg2.connect(dbname="postgres", **told)
        connection.autocommit = True
        connection.cursor().execute(f"create database {database}")
        connection.close()

    def send(self, sign: signal.Signals) -> None:
        """To its first process and to those that serve a connection."""
        first = int((self.folder / "postmaster.pid").read_text().split()[0])
        listed = subprocess.run(["pgrep", "-P", str(first)], capture_output=True, text=True)
        for pid in (first, *map(int, listed.stdout.split())):
            os.kill(pid, sign)

    def _call(self, name: str, *words) -> None:
        done = subprocess.run(
            [f"{BINARIES}/{name}", *map(str, words)],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            **self.user,
        )
        assert done.returncode == 0, done.stdout
