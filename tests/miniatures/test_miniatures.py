"""The miniatures: tokenizer, training that resumes exactly, and the committed checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsemm.documents import LABELS, READ_PROMPT, field_prompt, make_page
from sparsemm.errors import ConfigError, DataError
from sparsemm.miniatures.architectures import DIMENSIONS, FAMILIES, build_config, build_model, build_processor
from sparsemm.miniatures.batches import Mix, image_positions, make_batch, prompt_ids, tokenizer_of
from sparsemm.miniatures.stages import CURRICULUM, Stage
from sparsemm.miniatures.train import Trainer, train
from sparsemm.miniatures.vision import image_embeddings, llava_inputs, qwen_inputs
from sparsemm.runs.metrics import character_accuracy

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "miniatures"
SHIPPED = [family for family in FAMILIES if (ASSETS / family / "model.safetensors").is_file()]


def tiny_dims(family):
    """A model of the family that trains a step in milliseconds; its M-RoPE sections fix head_dim at 32."""
    return replace(
        DIMENSIONS[family],
        num_layers=1,
        hidden_size=64,
        intermediate_size=32,
        num_heads=2,
        num_kv_heads=2 if family == "llava-vicuna" else 1,
        vision_layers=1,
        vision_size=32,
        vision_heads=2,
        vision_intermediate=32,
    )


def conversation(page):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": page.prompt}]}]


def model_inputs(processor, pages):
    texts = [processor.apply_chat_template(conversation(page), add_generation_prompt=True) for page in pages]
    return processor(images=[page.image for page in pages], text=texts, return_tensors="pt", padding=True)


# ---- tokenizer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer_round_trip(family):
    tokenizer = tokenizer_of(family)
    for index in range(20):
        for task in ("read", "field"):
            answer = make_page(index, split="heldout", task=task).answer
            ids = tokenizer.encode(answer)
            assert tokenizer.decode(ids) == answer
            assert len(ids) == len(answer)  # one token a character
    assert tokenizer.decode(tokenizer.encode(READ_PROMPT)) == READ_PROMPT
    assert len(tokenizer.encode(READ_PROMPT)) <= 5
    assert tokenizer.unk_token_id not in tokenizer.encode(" ".join(map(field_prompt, LABELS)))
    assert tokenizer.encode("ABC") == tokenizer.encode("abc")


def test_families_share_their_character_ids():
    tokenizers = [tokenizer_of(family) for family in FAMILIES]
    assert len({tuple(t.encode("hello 123")) for t in tokenizers}) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_training_sees_the_prompt_that_the_processor_writes(family):
    processor = build_processor(family)
    page = make_page(0, split="heldout", task="field")
    ids = model_inputs(processor, [page])["input_ids"][0].tolist()
    before, after = prompt_ids(family, page.prompt)
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.tokenizer.image_token)
    block, _ = image_positions(family, len(before), 14, 14)
    assert block.shape[1] >= 196
    assert ids == [*before, *[image_id] * block.shape[1], *after]


# ---- from pixels to logits: the batched training path is the stock model ---------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_pixels_equal_the_stock_processor(family):
    pages = [make_page(i, split="heldout") for i in range(2)]
    stock = model_inputs(build_processor(family), pages)
    pixels = np.stack([np.asarray(page.image) for page in pages])
    if family == "qwen2-vl":
        values, grid = qwen_inputs(pixels)
        assert torch.equal(grid, stock["image_grid_thw"])
    else:
        values = llava_inputs(pixels)
    torch.testing.assert_close(values, stock["pixel_values"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_training_forward_equals_the_stock_model(family):
    model = build_model(family, dims=tiny_dims(family)).eval()
    page = make_page(1, split="heldout", task="field")
    inputs = model_inputs(build_processor(family), [page])
    reference = model(**inputs).logits
    before, after = prompt_ids(family, page.prompt)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    image = image_embeddings(model, np.asarray(page.image)[None])
    embeddings[:, len(before) : len(before) + image.shape[1]] = image
    block, following = image_positions(family, len(before), 14, 14)
    tail = np.arange(following, following + len(after))
    positions = torch.from_numpy(np.hstack([np.tile(np.arange(len(before)), (3, 1)), block, np.tile(tail, (3, 1))]))
    positions = positions[:, None] if family == "qwen2-vl" else positions[:1]
    hidden = model.model.language_model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
    ours = model.lm_head(hidden.last_hidden_state)
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


# ---- training --------------------------------------------------------------------------------------------------------


def tiny_stages(family):
    mix = Mix(14, 14, 1, 2, 1, 0.3)
    # One stage of each kind, cut short; a run is interrupted inside one of them.
    return (
        Stage("symbols", "symbols", 3, 2, Mix(4, 9, 1, 1, 1, 0.3)),
        Stage("glyphs", "glyphs", 1, 1, mix),
        Stage("pages", "pages", 3, 1, mix, decay=True),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_equals_an_undisturbed_one(family, tmp_path):
    def trainer(name):
        return Trainer(family, tmp_path / name, stages=tiny_stages(family), dims=tiny_dims(family))

    whole = trainer("whole")
    start = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.run()
    for steps in (2, 3):  # stops inside the first stage, then inside the last
        part = trainer("parts")
        if (tmp_path / "parts" / "progress.json").exists():
            part.load()
        part.run(max_steps=steps)
    last = trainer("parts")
    last.load()
    assert last.progress.total_steps == 5
    last.run()
    assert last.progress.total_steps == whole.progress.total_steps == 7
    for (name, ours), (_, theirs) in zip(last.model.named_parameters(), whole.model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert torch.equal(last.average[name], whole.average[name]), name
    assert last.progress.history == {"symbols": 3, "glyphs": 1, "pages": 3}
    changed = [name for name, p in whole.model.named_parameters() if not torch.equal(p, start[name])]
    assert any("language_model" in name for name in changed) and any("vis" in name for name in changed)


def test_stages_change_only_what_they_train(tmp_path):
    trainer = Trainer("llava-mistral", tmp_path, stages=tiny_stages("llava-mistral"), dims=tiny_dims("llava-mistral"))
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.run(max_steps=2)
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(parameter, start[name])
        assert moved == ("language_model" in name and "embed_tokens" not in name), name


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    trainer = Trainer("llava-mistral", tmp_path, stages=tiny_stages("llava-mistral"), dims=tiny_dims("llava-mistral"))
    trainer.run(max_steps=1)
    with pytest.raises(DataError, match="--resume"):
        train("llava-mistral", folder=tmp_path)
    with pytest.raises(DataError, match="holds a run of llava-mistral"):
        train("qwen2-vl", folder=tmp_path, resume=True)


def test_an_unknown_family_is_an_error():
    with pytest.raises(ConfigError, match="gpt"):
        build_config("gpt")


def test_batches_are_functions_of_their_seed():
    mix = CURRICULUM[-1].mix
    first, again, other = (make_batch("qwen2-vl", mix, 3, (0, 1, seed)) for seed in (2, 2, 3))
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.labels, again.labels)
    assert first.input_ids.shape != other.input_ids.shape or not torch.equal(first.input_ids, other.input_ids)
    # Every label is the token that follows.
    known = first.labels[:, :-1] != -100
    assert torch.equal(first.labels[:, :-1][known], first.input_ids[:, 1:][known])


# ---- the committed checkpoints ---------------------------------------------------------------------------------------


def test_miniatures_are_shipped():
    assert SHIPPED == list(FAMILIES)


@pytest.mark.parametrize("family", SHIPPED)
def test_shipped_folder_is_complete_and_small(family):
    folder = ASSETS / family
    for name in ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json", "README.md"):
        assert (folder / name).is_file(), name
    assert (folder / "chat_template.jinja").is_file()
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 6_000_000
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    assert text["num_hidden_layers"] >= 4 and text["num_attention_heads"] >= 8
    reading = json.loads((folder / "reading.json").read_text())
    assert reading["split"] == "heldout" and set(reading["tasks"]) == {"read", "field"}
    if family == "qwen2-vl":
        assert "video_processor" in json.loads((folder / "processor_config.json").read_text())


@pytest.mark.parametrize("family", SHIPPED)
def test_shipped_miniature_reads_heldout_pages(family):
    from sparsemm.miniatures.reading import answers
    from sparsemm.models import load_model

    model, processor = load_model(ASSETS / family)
    pages = [make_page(i, split="heldout", seed=77) for i in range(12)]
    texts = answers(model, processor, pages)
    accuracy = np.mean([character_accuracy(text, page.answer) for text, page in zip(texts, pages, strict=True)])
    # Well under what reading.json reports over hundreds of pages, far over what guessing gets.
    assert accuracy > 0.75
    # It is the image that is read: with another page's image the same questions go wrong.
    swapped = [replace(page, image=other.image) for page, other in zip(pages, pages[1:] + pages[:1], strict=True)]
    wrong = answers(model, processor, swapped)
    blind = np.mean([character_accuracy(text, page.answer) for text, page in zip(wrong, pages, strict=True)])
    assert blind < accuracy - 0.4
