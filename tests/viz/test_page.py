"""The interactive page in a real browser, spoken to as WebDriver has it (W3C): no package, no network."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sparsemm import HeadScores
from sparsemm.models.geometry import ImageLayout, grid_cells
from sparsemm.viz.page import write_page
from sparsemm.viz.reading import Reading

TOKENS = ["c", "a t", "</script><b>", "<eos>"]
HEADS = [(0, 1), (2, 0), (2, 3)]
ROWS, COLS = 3, 4


def reading() -> Reading:
    """Token t under head h looks at cell (t + 5 h) of the high-resolution grid, and at base cell 0."""
    base_rows, base_cols = grid_cells(1, 2)
    rows, cols = grid_cells(ROWS, COLS + 1)
    parts = ("base",) * 2 + tuple("newline" if col == COLS else "high_res" for col in cols.tolist())
    layout = ImageLayout(
        columns=torch.arange(len(parts)) + 1,
        parts=parts,
        rows=torch.cat([base_rows, rows]),
        cols=torch.cat([base_cols, cols]),
        grids={"high_res": (ROWS, COLS), "base": (1, 2)},
        main_part="high_res",
    )
    weights = torch.full((len(TOKENS), len(HEADS), len(parts)), 0.001)
    weights[:, :, 0] = 0.05
    for token in range(len(TOKENS)):
        for head in range(len(HEADS)):
            row, col = divmod((token + 5 * head) % (ROWS * COLS), COLS)
            weights[token, head, 2 + row * (COLS + 1) + col] = 0.5 + 0.1 * token
    return Reading(Image.new("RGB", (80, 60), "white"), "Read <this> & that", TOKENS, HEADS, weights, layout)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "attention.html"
    values = torch.zeros(3, 4)
    for share, (layer, head) in zip((1.0, 2.0, 7.0), HEADS, strict=True):
        values[layer, head] = share
    write_page(reading(), path, scores=HeadScores(values), title="Heads <of> a toy")
    return path


class Browser:
    """One session of a WebDriver."""

    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"
        binary = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1200,900",
        ]
        options = {"args": arguments, **({"binary": binary} if binary else {})}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        answer = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.root += f"/session/{answer['sessionId']}"

    def call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def open(self, path: Path) -> None:
        self.call("POST", "/url", {"url": path.as_uri()})
        for _ in range(200):
            if self.run("return document.body.dataset.shown || null"):
                return
            time.sleep(0.05)
        raise AssertionError(f"the page did not draw: {self.log()}")

    def run(self, script: str) -> Any:
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def click(self, selector: str) -> None:
        element = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{next(iter(element.values()))}/click", {})

    def keys(self, text: str) -> None:
        element = self.call("POST", "/element", {"using": "css selector", "value": "body"})
        self.call("POST", f"/element/{next(iter(element.values()))}/value", {"text": text})

    def shown(self) -> str:
        return self.run("return document.body.dataset.shown")

    def log(self) -> list[str]:
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver on this machine (Debian: chromium and chromium-driver)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/status", timeout=5).close()
                break
            except OSError:
                time.sleep(0.05)
        session = Browser(port)
        yield session
        session.call("DELETE", "")
    finally:
        process.terminate()
        process.wait()


def test_the_file_needs_no_network(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)[a-z]+:""", text)
    assert "http://" not in text and "https://" not in text and "import" not in text
    assert "default-src 'none'" in text
    assert text.count("</script>") == 2, "text of the page cannot end its script"
    assert "<title>Heads &lt;of&gt; a toy</title>" in text and str(page.parent) not in text


def test_picking_tokens_and_heads(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.run("return document.title") == "Heads <of> a toy"
    assert browser.run("return document.getElementById('prompt').textContent") == "Asked: Read <this> & that"
    labels = browser.run("return [...document.querySelectorAll('#tokens button')].map(b => b.textContent)")
    assert labels == ["all", *TOKENS]
    heads = browser.run("return [...document.querySelectorAll('#heads button')].map(b => b.textContent)")
    assert heads == ["1 10.0%", "0 20.0%", "3 70.0%"]
    # The mean over all tokens is largest where the last one looks, 0.8 at cell 3.
    assert browser.shown() == "-1 0-1 high_res 0 3"
    for token in range(len(TOKENS)):
        browser.click(f"#tokens button[data-token='{token}']")
        for head, (layer, number) in enumerate(HEADS):
            browser.click(f"#heads button[data-head='{head}']")
            row, col = divmod((token + 5 * head) % (ROWS * COLS), COLS)
            assert browser.shown() == f"{token} {layer}-{number} high_res {row} {col}"
            readout = browser.run("return document.getElementById('readout').textContent")
            assert f"{0.5 + 0.1 * token:.3f} at row {row}, column {col}" in readout
            pressed = browser.run("return [...document.querySelectorAll('[aria-pressed=true]')].map(b => b.dataset)")
            assert pressed == [{"token": str(token)}, {"head": str(head)}]
    assert browser.log() == []
    assert browser.run("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:'))") == []


def test_colours_on_the_canvas_follow_the_weights(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.click("#tokens button[data-token='1']")
    browser.click("#heads button[data-head='1']")
    browser.run("const o = document.getElementById('opacity'); o.value = 100; o.dispatchEvent(new Event('input'))")
    pixel = """
        const canvas = document.getElementById('page'), context = canvas.getContext('2d');
        return (x, y) => [...context.getImageData(x * canvas.width, y * canvas.height, 1, 1).data].slice(0, 3)
    """
    look = f"const at = (() => {{ {pixel} }})();"
    # Token 1 under head 1 looks at cell 6: row 1, column 2. The scale ends in orange; elsewhere white stays white.
    assert browser.run(look + "return at(2.5 / 4, 1.5 / 3)") == [255, 154, 31]
    assert min(browser.run(look + "return at(0.5 / 4, 0.5 / 3)")) > 250
    browser.run("const o = document.getElementById('opacity'); o.value = 0; o.dispatchEvent(new Event('input'))")
    assert browser.run(look + "return at(2.5 / 4, 1.5 / 3)") == [255, 255, 255]


def test_keyboard_and_part_of_the_image(browser: Browser, page: Path) -> None:
    browser.open(page)
    right, down, left = "\ue014", "\ue015", "\ue012"
    browser.keys(right + right + down)
    assert browser.shown() == "1 2-0 high_res 1 2"
    browser.keys(left * 9)
    assert browser.shown().startswith("-1 2-0")
    browser.run("const p = document.getElementById('part'); p.value = 1; p.dispatchEvent(new Event('change'))")
    assert browser.shown() == "-1 2-0 base 0 0"
