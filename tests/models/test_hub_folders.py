"""Checkpoint folders in the forms in which the hub has them: each family's load, and read as they were saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toy_vlms import TOYS, load_or_skip, toy_vlm

from sparsemm.models import family_of

OLD_NAMES = {"llava": "CLIPImageProcessor"}
"""Of an image processor, where it was another class than the family's present one."""


def write(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def taken_apart(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The processor's own settings, those of its image processor (of the class with torchvision), its chat template;
    none of them is left in the folder."""
    own = read(folder / "processor_config.json")
    image = own.pop("image_processor")
    own.pop("video_processor", None)
    image["image_processor_type"] = image["image_processor_type"].removesuffix("Pil")
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("processor_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    return own, image, template


def first_form(folder: Path, name: str) -> None:
    """As the first checkpoints of a family: slow classes, areas as min_pixels and max_pixels, chat_template.json."""
    own, image, template = taken_apart(folder)
    image["image_processor_type"] = OLD_NAMES.get(name, image["image_processor_type"])
    size = image.get("size", {})
    if image["image_processor_type"] == "Qwen2VLImageProcessor":
        image |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        del image["size"]
    write(folder / "preprocessor_config.json", {**image, "processor_class": own["processor_class"]})
    write(folder / "chat_template.json", {"chat_template": template})
    if own.keys() > {"processor_class"}:
        write(folder / "processor_config.json", own)


def fast_form(folder: Path, name: str) -> None:
    """Fast classes, a file for videos, the chat template among the tokenizer's settings."""
    own, image, template = taken_apart(folder)
    image["image_processor_type"] += "Fast"
    write(folder / "preprocessor_config.json", {**image, "processor_class": own["processor_class"]})
    video = own["processor_class"].replace("Processor", "VideoProcessor").replace("Qwen2_5_VL", "Qwen2VL")
    write(folder / "video_preprocessor_config.json", {"video_processor_type": video, "fps": 2, "max_frames": 768})
    if own.keys() > {"processor_class"}:
        write(folder / "processor_config.json", own)
    settings = read(folder / "tokenizer_config.json")
    write(folder / "tokenizer_config.json", {**settings, "chat_template": template})


def one_file(folder: Path, name: str) -> None:
    """All settings in processor_config.json, as transformers saves them where torchvision is present."""
    own, image, template = taken_apart(folder)
    image["image_processor_type"] += "Fast"
    write(folder / "processor_config.json", {**own, "image_processor": image})
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


@pytest.fixture(scope="module", params=TOYS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any, Path]:
    """A family's name, its toy model and processor, and the folder that transformers makes of them."""
    model, processor = toy_vlm(request.param)
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return request.param, model, processor, folder


@pytest.mark.parametrize("form", [None, first_form, fast_form, one_file])
def test_folders_of_the_hub_read_as_they_were_saved(
    form: Callable[[Path, str], None] | None, saved: tuple[str, Any, Any, Path], tmp_path: Path
) -> None:
    name, model, processor, folder = saved
    if form is not None:
        folder = shutil.copytree(folder, tmp_path / "folder")
        form(folder, name)
    loaded, again = load_or_skip(folder)
    assert type(loaded) is type(model) and again.tokenizer.padding_side == "left"
    image = Image.effect_noise((61, 34), 90).convert("RGB")
    first, second = (
        family_of(model).build_inputs(each, [[image], None], ["Read.", "Hello."]) for each in (processor, again)
    )
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    if form is None:  # the others change nothing of the weights
        with torch.no_grad():
            assert torch.equal(model(**first).logits, loaded(**second).logits)
