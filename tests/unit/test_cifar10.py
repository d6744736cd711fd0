"""CIFAR-10: downloaded once, checked, given up in bounded time; other data in its place, with a warning."""

from __future__ import annotations

import hashlib
import http.server
import io
import pickle
import socket
import tarfile
import threading
import time

import numpy as np
import pytest

from pipeline import image_sources
from pipeline._torchvision import make_importable
from pipeline.datasets import DataWarning, load, prepare
from pipeline.errors import InputError
from pipeline.stored_images import StoredImages

make_importable()
from torchvision.datasets import CIFAR10  # noqa: E402 - importable only now

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def nothing_is_fetched_from_outside(monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{free_port()}/{CIFAR10.filename}")


def cifar10_archive(monkeypatch) -> bytes:
    random = np.random.default_rng(0)
    files = {CIFAR10.meta["filename"]: {"label_names": list(CIFAR10_CLASSES)}}
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list):
        pixels = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        files[name] = {"data": pixels, "labels": random.integers(0, 10, 4).tolist()}
    contents = {name: pickle.dumps(value) for name, value in files.items()}
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, md5[name]] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5[CIFAR10.meta["filename"]]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    return packed.getvalue()


@pytest.fixture
def serve(monkeypatch):
    """Serve bytes on loopback where CIFAR-10 is looked for, or only half of them; gives the list of requests."""
    servers = []
    finished = threading.Event()

    def start(content: bytes, *, stalls: bool = False) -> list[str]:
        requests = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                requests.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if stalls else content)
                if stalls:
                    self.wfile.flush()
                    finished.wait(10)

            def log_message(self, *_):
                """Silent."""

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
        return requests

    yield start
    finished.set()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("data", ["auto", "cifar10"])
def test_cifar10_is_downloaded_once_and_then_read_from_its_folder(tmp_path, monkeypatch, serve, data, capsys):
    requests = serve(cifar10_archive(monkeypatch))
    first, again = (load(data, root=tmp_path) for _ in range(2))
    assert len(requests) == 1
    assert "Downloading" in capsys.readouterr().err
    assert (again.name, again.warning, again.classes) == ("CIFAR-10", None, CIFAR10_CLASSES)
    assert (len(again.train), len(again.test), again.image_shape) == (20, 4, (3, 32, 32))
    np.testing.assert_array_equal(first.train.images_NCHW, again.train.images_NCHW)
    expected = np.asarray(CIFAR10(tmp_path)[5][0]).transpose(2, 0, 1)
    np.testing.assert_array_equal(again.train.images_NCHW[5], expected)


def test_cifar10_archive_put_into_the_folder_by_hand_needs_no_network(tmp_path, monkeypatch):
    (tmp_path / CIFAR10.filename).write_bytes(cifar10_archive(monkeypatch))
    assert load("cifar10", root=tmp_path, image_size=16).image_shape == (3, 16, 16)


def test_damaged_download_is_refused_and_the_digits_used_with_a_warning(tmp_path, monkeypatch, serve):
    serve(cifar10_archive(monkeypatch)[:-10])
    with pytest.warns(DataWarning, match=r"CIFAR-10 is not in .*corrupted.*digits that ship with scikit-learn"):
        images = load("auto", root=tmp_path)
    assert images.name == "digits (scikit-learn)"


def test_download_that_stalls_is_given_up_and_leaves_nothing_behind(tmp_path, monkeypatch, serve):
    monkeypatch.setattr(image_sources, "SILENCE_LIMIT_S", 0.3)
    serve(cifar10_archive(monkeypatch), stalls=True)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"cannot be had from .*timed out"):
        load("cifar10", root=tmp_path)
    assert time.monotonic() - start < 5
    assert not list(tmp_path.iterdir())


def test_look_up_of_the_name_that_takes_for_ever_is_given_up_in_bounded_time(tmp_path, monkeypatch):
    released = threading.Event()

    def stuck(*_args, **_options):
        released.wait(10)
        raise OSError("released")

    monkeypatch.setattr(image_sources, "SILENCE_LIMIT_S", 0.3)
    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    start = time.monotonic()
    with pytest.raises(InputError, match=r"no answer within 0\.3 s"):
        load("cifar10", root=tmp_path)
    released.set()
    assert time.monotonic() - start < 5


def test_unreachable_cifar10_is_an_error_when_it_was_asked_for(tmp_path):
    with pytest.raises(InputError, match=r"CIFAR-10 is not in .* and cannot be had from http://127.*refused.*'digits'"):
        load("cifar10", root=tmp_path)


def test_server_that_never_answers_is_given_up_in_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sources, "SILENCE_LIMIT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        start = time.monotonic()
        with pytest.warns(DataWarning, match="timed out|no answer within"):
            load("auto", root=tmp_path)
    assert time.monotonic() - start < 5


def test_data_that_replace_others_say_so_in_the_store(tmp_path):
    path = tmp_path / "images.zarr.zip"
    with pytest.warns(DataWarning):
        prepare("auto", path, root=tmp_path)
    stored = StoredImages(path, "test")
    assert stored.source_name == "digits (scikit-learn)"
    assert "CIFAR-10 is not in" in stored.warning
