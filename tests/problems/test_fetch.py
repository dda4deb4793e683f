"""Downloads from a server of this machine: whole, broken off, resumed, changed, packed."""

import hashlib
import io
import json
import socket
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from typer.testing import CliRunner

from ocnopt.errors import DataError, ProblemError
from ocnopt.problems.learning import fetch as module
from ocnopt.problems.learning.fetch import DATA_SETS, DataSet, Download, fetch
from ocnopt.problems.learning.files import read_idx

CONTENT = bytes(range(256)) * 1000


class Handler(BaseHTTPRequestHandler):
    """Answers with a part where one is asked for, and breaks off where the server says so."""

    def do_GET(self):
        content = self.server.files.get(self.path[1:])
        if content is None:
            self.send_error(404)
            return
        asked = self.headers.get("Range")
        begin = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.server.asked.append(asked)
        if begin > len(content):
            self.send_error(416)
            return
        rest = content[begin:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.server.breaks_off or None])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("OCNOPT_DATA", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.asked, server.breaks_off = {"a.bin": CONTENT}, [], 0
    server.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def known(monkeypatch, *downloads):
    monkeypatch.setattr(module, "DATA_SETS", {"small": DataSet("small", "for a test", downloads)})


def md5(content):
    return f"md5:{hashlib.md5(content, usedforsecurity=False).hexdigest()}"


def test_a_download_with_its_checksum(server, monkeypatch, tmp_path):
    known(monkeypatch, Download(f"{server.url}a.bin", md5(CONTENT)))
    progress = []
    path = tmp_path / "small" / "a.bin"
    assert [*fetch("small", lambda *now: progress.append(now))] == [(path, "checksum as published")]
    assert path.read_bytes() == CONTENT
    assert progress[-1] == ("a.bin", len(CONTENT), len(CONTENT))
    assert len(progress) > 2
    assert [*fetch("small")] == [(path, "there already")]
    assert len(server.asked) == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["a.bin"]


def test_a_download_that_breaks_off_goes_on(server, monkeypatch, tmp_path):
    known(monkeypatch, Download(f"{server.url}a.bin", md5(CONTENT)))
    server.breaks_off = 100_000
    with pytest.raises(DataError, match="a.bin could not be downloaded .*fetch again, which goes on where it stopped"):
        [*fetch("small")]
    assert DataSet("small", "", (Download(f"{server.url}a.bin"),)).missing() == ["a.bin"]
    kept = (tmp_path / "small" / ".a.bin.part").stat().st_size
    assert 0 < kept <= 100_000
    server.breaks_off = 0
    assert next(fetch("small"))[1] == "checksum as published"
    assert server.asked == [None, f"bytes={kept}-"]
    assert (tmp_path / "small" / "a.bin").read_bytes() == CONTENT


def test_more_is_there_than_the_server_has(server, monkeypatch, tmp_path):
    known(monkeypatch, Download(f"{server.url}a.bin", md5(CONTENT)))
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / ".a.bin.part").write_bytes(CONTENT + b"more")
    assert next(fetch("small"))[1] == "checksum as published"


def test_another_file_than_published(server, monkeypatch, tmp_path):
    known(monkeypatch, Download(f"{server.url}a.bin", md5(b"")))
    with pytest.raises(DataError, match=rf"(?s)does not match.*expected {md5(b'')}: fetch again"):
        [*fetch("small")]
    assert [*tmp_path.iterdir()] == []


def test_a_checksum_of_one_s_own(server, monkeypatch, tmp_path):
    known(monkeypatch, Download(f"{server.url}a.bin"))
    path = tmp_path / "small" / "a.bin"
    assert [*fetch("small")] == [(path, "checksum noted, none is published")]
    noted = json.loads((tmp_path / "checksums.json").read_text())
    assert noted == {"small/a.bin": hashlib.sha256(CONTENT).hexdigest()}
    path.unlink()
    server.files["a.bin"] = b"something else"
    with pytest.raises(DataError, match=r"small/a.bin has SHA-256 .*; expected .*, noted in .*checksums.json"):
        [*fetch("small")]
    assert not path.exists()


def packed(kind, files):
    target = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(target, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=target, mode="w:gz") as archive:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return target.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_an_archive(server, monkeypatch, tmp_path, kind):
    server.files[f"a.{kind}"] = packed(kind, {"deep/one.ts": b"1", "two.ts": b"2", "../three.ts": b"3"})
    known(monkeypatch, Download(f"{server.url}a.{kind}", members=("one.ts", "two.ts")))
    assert [path.read_bytes() for path, _ in fetch("small")] == [b"1", b"2"]
    # nothing else is unpacked, and the archive is not kept
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["checksums.json", "one.ts", "two.ts"]
    known(monkeypatch, Download(f"{server.url}a.{kind}", members=("four.ts",)))
    with pytest.raises(DataError, match=r"holds deep/one.ts, .*; expected four.ts in it"):
        [*fetch("small")]
    server.files[f"b.{kind}"] = server.files[f"a.{kind}"][:40]
    known(monkeypatch, Download(f"{server.url}b.{kind}", members=("four.ts",)))
    with pytest.raises(DataError, match="of 40 bytes is no whole archive"):
        [*fetch("small")]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["checksums.json", "one.ts", "two.ts"]


def test_what_cannot_be_had(server, monkeypatch, tmp_path):
    known(monkeypatch, Download(f"{server.url}missing.bin"))
    with pytest.raises(DataError, match=r"missing.bin could not be downloaded \(404"):
        [*fetch("small")]
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(ProblemError, match="no data set is called 'smal'; did you mean 'small'"):
        [*fetch("smal")]


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A port that nobody listens at, and a data folder yet to be made."""
    monkeypatch.setenv("OCNOPT_DATA", str(tmp_path / "cache" / "data"))
    monkeypatch.setenv("NO_PROXY", "*")
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/a.bin"


def test_without_a_network(nowhere, monkeypatch, tmp_path):
    from ocnopt.cli.main import app

    monkeypatch.setitem(DATA_SETS, "small", DataSet("small", "for a test", (Download(nowhere),)))
    with pytest.raises(DataError) as failed:
        [*fetch("small")]
    folder = tmp_path / "cache" / "data" / "small"
    assert str(failed.value) == (
        f"{nowhere} could not be downloaded (Connection refused); expected the whole file: fetch it where there is a "
        f"network, or put it into {folder} by hand"
    )
    found = CliRunner().invoke(app, ["data", "fetch", "small"])
    assert found.exit_code == 2
    assert found.stderr.count("Connection refused") == 1
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "cache").mkdir()  # what was there stays
    with pytest.raises(DataError):
        [*fetch("small")]
    assert [*tmp_path.rglob("*")] == [tmp_path / "cache"]


def test_a_server_that_sends_nothing(server, monkeypatch, tmp_path):
    known(monkeypatch, Download(f"{server.url}a.bin"))
    monkeypatch.setattr(Handler, "send_response", lambda self, *_: self.connection.close())
    with pytest.raises(DataError, match=r"a.bin could not be downloaded \([^(]*\); .*: fetch it where there is"):
        [*fetch("small")]
    assert [*tmp_path.iterdir()] == []


def test_every_set_is_named_as_its_problem():
    from ocnopt.problems import names

    assert all(any(name in (known, known.removesuffix("_flow")) for known in names("learning")) for name in DATA_SETS)
    for dataset in DATA_SETS.values():
        for download in dataset.downloads:
            assert download.url.startswith("http")
            assert download.checksum == "" or len(download.checksum) == len("md5:") + 32


def test_the_command(server, monkeypatch, tmp_path):
    from ocnopt.cli.main import app

    def run(*arguments):
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["data", *arguments])

    monkeypatch.setattr(module, "DATA_SETS", DATA_SETS)
    header = b"\0\0\x08\x01\0\0\0\x02\x01\x02"
    server.files["small-idx1-ubyte"] = header
    DATA_SETS["small"] = DataSet("small", "for a test", (Download(f"{server.url}small-idx1-ubyte"),))
    try:
        assert all(name in run().output for name in DATA_SETS)
        found = run("fetch", "small")
        assert found.exit_code == 0
        assert "small-idx1-ubyte: checksum noted, none is published" in found.output.replace("\n", "")
        assert read_idx(tmp_path / "small" / "small-idx1-ubyte").tolist() == [1, 2]
        assert run("fetch", "smal").exit_code == 2
        assert run("get", "small").exit_code == 2
    finally:
        del DATA_SETS["small"]
