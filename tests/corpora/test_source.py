"""Files are found, downloaded with a checksum, read in pieces, and refused by name."""

from __future__ import annotations

import gzip
import hashlib
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from corpora import source
from corpora.source import File, Found, fetch, find, folder_of, pieces, read, texts

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(BaseHTTPRequestHandler):
    """Gives CONTENT, from the byte asked for; `/short` ends too early; `/whole` does not know of ranges."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append(f"{self.path} {wanted}")
        if self.path == "/missing":
            self.send_error(404)
            return
        begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.path != "/whole" else 0
        if begin >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(CONTENT) - begin))
        self.end_headers()
        self.wfile.write(CONTENT[begin : 3000 if self.path == "/short" else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Server.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_missing_is_downloaded_once(address: str, tmp_path: Path) -> None:
    file = File("some.txt", f"{address}/whole", SHA256)
    found = find(tmp_path / "new", file)
    assert found == Found(tmp_path / "new" / "some.txt")
    assert read(found) == CONTENT
    assert find(tmp_path / "new", file) == found
    assert Server.asked == ["/whole None"]


def test_a_broken_download_goes_on_where_it_ended(address: str, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    with pytest.raises(FileNotFoundError, match=r"there is no some\.txt in .* cannot be downloaded .*put it there"):
        fetch(f"{address}/short", path, SHA256)
    assert (tmp_path / "some.txt.part").read_bytes() == CONTENT[:3000]
    fetch(f"{address}/rest", path, SHA256)
    assert Server.asked[-1] == "/rest bytes=3000-"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == ["some.txt"]


def test_a_part_is_not_trusted_by_a_server_that_sends_all(address: str, tmp_path: Path) -> None:
    (tmp_path / "some.txt.part").write_bytes(b"something else")
    fetch(f"{address}/whole", tmp_path / "some.txt", SHA256)
    assert (tmp_path / "some.txt").read_bytes() == CONTENT


def test_a_part_that_was_complete_is_taken(address: str, tmp_path: Path) -> None:
    (tmp_path / "some.txt.part").write_bytes(CONTENT)
    fetch(f"{address}/rest", tmp_path / "some.txt", SHA256)
    assert (tmp_path / "some.txt").read_bytes() == CONTENT


def test_another_checksum_is_refused_and_nothing_kept(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"checksum {SHA256}, but {'0' * 64} was expected"):
        fetch(f"{address}/whole", tmp_path / "some.txt", "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_has_nothing_names_file_folder_and_address(address: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no some\.txt in {tmp_path}.*{address}/missing.*Not Found"):
        find(tmp_path, File("some.txt", f"{address}/missing", SHA256))


def test_a_folder_comes_from_the_argument_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [File("a.txt"), File("b.txt")]
    monkeypatch.setenv("HFOPT_DATA", str(tmp_path))
    assert folder_of(None, "letters", files) == tmp_path / "letters"
    assert folder_of("elsewhere", "letters", files) == Path("elsewhere")
    monkeypatch.delenv("HFOPT_DATA")
    with pytest.raises(
        FileNotFoundError, match=r"letters needs the files a\.txt, b\.txt: .*HFOPT_DATA.*put them there"
    ):
        folder_of(None, "letters", files)


def test_a_missing_file_without_an_address_says_what_to_put_where(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"there is no a\.txt in {tmp_path}, plain or as a\.txt\.gz: put it there$"
    ):
        find(tmp_path, File("a.txt"))
    with pytest.raises(FileNotFoundError, match=r"it is published at http://x/a\.txt"):
        find(tmp_path, File("a.txt", "http://x/a.txt", SHA256), download=False)


def test_plain_packed_and_archived_files_are_found_and_read(tmp_path: Path) -> None:
    file = File("a.txt", "http://x/y/letters.zip", SHA256, member="inside/a.txt")
    with zipfile.ZipFile(tmp_path / "letters.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside/a.txt", CONTENT)
        archive.writestr("inside/b.txt", b"b")
    assert read(find(tmp_path, file)) == CONTENT
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert read(find(tmp_path, file)) == b"packed"
    (tmp_path / "a.txt").write_bytes(b"plain")
    assert read(find(tmp_path, file)) == b"plain"


def test_damaged_empty_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    packed = gzip.compress(CONTENT)
    cases = {
        "cut.gz": (packed[:-20], r"cut\.gz is no complete gzip file"),
        "none.gz": (b"plain", r"none\.gz is no complete gzip file"),
        "flipped.gz": (packed[:20] + bytes(30) + packed[50:], r"flipped\.gz is no complete gzip file"),
        "empty.txt": (b"", r"empty\.txt is empty"),
        "empty.gz": (gzip.compress(b""), r"empty\.gz is empty"),
        "none.zip": (b"plain", r"none\.zip is no complete zip archive"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read(tmp_path)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a", "a")
        archive.writestr("b", "b")
    with pytest.raises(ValueError, match=r"two\.zip has 2 files, and a single one was expected; it has a, b"):
        read(tmp_path / "two.zip")
    with pytest.raises(ValueError, match=r"two\.zip has no c; it has a, b"):
        read(Found(tmp_path / "two.zip", "c"))


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(10_000_000)))
    with pytest.raises(ValueError, match=r"bomb\.gz has more than 5,000,000 bytes"):
        read(tmp_path / "bomb.gz", 5_000_000)


def test_text_is_decoded_across_the_borders_of_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Füße 中文 🎼 " * 50
    (tmp_path / "a.txt").write_text("\ufeff" + text, encoding="utf-8")
    for piece in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(source, "PIECE", piece)
        assert "".join(texts(tmp_path / "a.txt")) == text


def test_text_in_another_encoding_is_refused_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"ein Fu\xdf lang")
    message = r"a\.txt is no UTF-8 text: byte 6 is 0xdf \(.*\); give its encoding, or convert the file"
    for piece in (1, 2, 3, 1000):
        monkeypatch.setattr(source, "PIECE", piece)
        with pytest.raises(ValueError, match=message):
            list(texts(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_bytes("zu kurz: 中".encode()[:-1])
    with pytest.raises(ValueError, match="byte 9 is 0xe4"):
        list(texts(tmp_path / "b.txt"))
    assert "".join(texts(tmp_path / "a.txt", "latin-1")) == "ein Fuß lang"


def test_pieces_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(3 * source.PIECE))
    assert [len(piece) for piece in pieces(tmp_path / "a.bin")] == [source.PIECE] * 3
