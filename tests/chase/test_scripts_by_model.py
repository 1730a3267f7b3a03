"""The scripts take a checkpoint of any family by `MODEL=`: one that no script is named after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pages_as_read import TOKENS, page_of
from toy_vlms import toy_vlm

from sparsemm import HeadScores
from sparsemm.chase import chase

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def run(script: str, *options: str, **variables: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables, "PATH": path}
    command = ["bash", str(SCRIPTS / script), *options]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "internvl-toy"
    for part in toy_vlm("internvl"):
        part.save_pretrained(folder)
    return folder


def test_chase_visual_head(checkpoint: Path, tmp_path: Path) -> None:
    model, processor = toy_vlm("internvl")
    page = page_of(model, processor)
    page.image.save(tmp_path / "1.png")
    words = [{"text": word.text, "box": list(word.box)} for word in page.words]
    (tmp_path / "boxes.json").write_text(json.dumps([{"image": "1.png", "words": words}]))
    output = tmp_path / "scores.json"
    settings = {"MODEL": checkpoint, "DATASET": tmp_path / "boxes.json", "OUTPUT": output}
    run(
        "chase_visual_head/qwen.sh", "--max-new-tokens", str(TOKENS), "--least-read", "0",
        **{name: str(value) for name, value in settings.items()}, NUM_IMAGES="1", MATCH="aligned", DEVICE="cpu",
    )  # fmt: skip
    found = HeadScores.load(output)
    assert found.provenance["model"] == "internvl-toy"
    expected = chase(model, processor, [page], match="aligned", max_new_tokens=TOKENS, progress=False)
    torch.testing.assert_close(found.values, expected.values)


def test_eval(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (make install does it)")
    pytest.importorskip("sparsemm_lmms_eval", reason="the plug-in is not installed (make install does it)")
    run(
        "eval/qwen.sh", MODEL=str(checkpoint), METHODS="snapkv", BUDGETS="8", TASKS="sparsemm_read", WINDOW_SIZE="4",
        ROUNDING="exact", LIMIT="2", BATCH_SIZE="2", DEVICE="cpu", OUTPUT=str(tmp_path / "out"),
    )  # fmt: skip
    (cell,) = (tmp_path / "out" / "internvl-toy" / "sparsemm_read").iterdir()
    assert json.loads((cell / "cell.json").read_text())["processes"] == 1
