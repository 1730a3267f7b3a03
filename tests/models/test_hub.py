"""Hub ids where the hub does not answer: asked once, said in one line; an answer is left to those who load."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from sparsemm.datasets import open_pages
from sparsemm.errors import DataError
from sparsemm.io import reach_hub
from sparsemm.models import load_model


class Hub(HTTPServer):
    """Notes what it is asked; answers 404, or hangs up."""

    asked: list[str]
    silent: bool


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        if not self.path.startswith("/api/"):  # huggingface_hub's own business
            self.server.asked.append(self.path)
        if self.server.silent:
            self.close_connection = True
            return
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Handler)
    server.asked, server.silent = [], True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    here = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", here)
    template = here + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("load", "path"), [(load_model, "/nobody/nothing"), (open_pages, "/datasets/nobody/nothing")], ids=["model", "data"]
)
def test_a_hub_that_does_not_answer_is_asked_once(load: Any, path: str, hub: Hub) -> None:
    with pytest.raises(DataError, match="nobody/nothing is not here, and the hub does not answer") as at:
        load("nobody/nothing")
    assert len(hub.asked) == 1 and hub.asked[0].startswith(path)
    assert "\n" not in str(at.value)


def test_an_answer_is_enough_and_what_is_here_is_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    hub.silent = False
    reach_hub("nobody/nothing", "config.json")
    assert len(hub.asked) == 1
    kept = tmp_path / "models--some--model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("1" * 40)
    (kept / "snapshots" / ("1" * 40)).mkdir(parents=True)
    (kept / "snapshots" / ("1" * 40) / "config.json").write_text("{}")
    reach_hub("some/model", "config.json")
    assert len(hub.asked) == 1
    with pytest.raises(DataError, match="does not answer .*Repo id"):
        reach_hub("what ever/this is", "config.json")
