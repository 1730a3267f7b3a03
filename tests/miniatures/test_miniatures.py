"""The miniatures: tokenizer, training that resumes exactly, and the committed checkpoints."""

from __future__ import annotations

import inspect
import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from tiny_miniatures import SCHEDULE, STAGES, tiny_dims, tiny_trainer
from typer.testing import CliRunner

from sparsemm.cli import miniatures as cli
from sparsemm.documents import LABELS, READ_PROMPT, field_prompt, make_page
from sparsemm.errors import ConfigError, DataError
from sparsemm.miniatures import export as export_module
from sparsemm.miniatures import train as train_module
from sparsemm.miniatures.architectures import DIMENSIONS, FAMILIES, build_config, build_model, build_processor
from sparsemm.miniatures.batches import IGNORE, Mix, draw_layout, image_positions, make_batch, prompt_ids, tokenizer_of
from sparsemm.miniatures.batches import conversation as whole_conversation
from sparsemm.miniatures.losses import read
from sparsemm.miniatures.stages import CURRICULUM
from sparsemm.miniatures.tokenizer import CHAT_TEMPLATES, QWEN
from sparsemm.miniatures.train import Trainer, train
from sparsemm.miniatures.vision import image_embeddings, llava_inputs, qwen_inputs
from sparsemm.runs.metrics import character_accuracy

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "miniatures"
SHIPPED = [family for family in FAMILIES if (ASSETS / family / "model.safetensors").is_file()]


def page_of(family, index, **options):
    return make_page(index, split="heldout", size=DIMENSIONS[family].page_size, **options)


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
    page = page_of(family, 0, task="field")
    ids = model_inputs(processor, [page])["input_ids"][0].tolist()
    before, after = prompt_ids(family, page.prompt)
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.tokenizer.image_token)
    cells = DIMENSIONS[family].page_size // DIMENSIONS[family].cell
    block, _ = image_positions(family, len(before), cells, cells)
    assert block.shape[1] >= 196
    assert ids == [*before, *[image_id] * block.shape[1], *after]


# ---- from pixels to logits: the batched training path is the stock model ---------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_pixels_equal_the_stock_processor(family):
    pages = [page_of(family, i) for i in range(2)]
    stock = model_inputs(build_processor(family), pages)
    pixels = np.stack([np.asarray(page.image) for page in pages])
    if family in QWEN:
        dims = DIMENSIONS[family]
        values, grid = qwen_inputs(pixels, patch=dims.patch_size, merge=dims.cell // dims.patch_size)
        assert torch.equal(grid, stock["image_grid_thw"])
    else:
        values = llava_inputs(pixels)
    torch.testing.assert_close(values, stock["pixel_values"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_training_forward_equals_the_stock_model(family):
    model = build_model(family, dims=tiny_dims(family)).eval()
    for name, parameter in model.named_parameters():
        if "deepstack" in name:  # zero at first
            torch.nn.init.normal_(parameter, std=0.02)
    page = page_of(family, 1, task="field")
    inputs = model_inputs(build_processor(family), [page])
    reference = model(**inputs).logits
    before, after = prompt_ids(family, page.prompt)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    image, deepstack = image_embeddings(model, np.asarray(page.image)[None])
    place = slice(len(before), len(before) + image.shape[1])
    embeddings[:, place] = image
    cells = DIMENSIONS[family].page_size // DIMENSIONS[family].cell
    block, following = image_positions(family, len(before), cells, cells)
    tail = np.arange(following, following + len(after))
    positions = torch.from_numpy(np.hstack([np.tile(np.arange(len(before)), (3, 1)), block, np.tile(tail, (3, 1))]))
    ours = model.lm_head(read(model, embeddings, positions, place, deepstack))
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


# ---- training --------------------------------------------------------------------------------------------------------


def interrupt(*_):
    raise KeyboardInterrupt


class Killed(Exception):
    """Stands for a process that is gone."""


def stored(trainer):
    """The checkpoint as bytes, but for the clock."""
    with safe_open(trainer.checkpoint, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
        tensors = {name: file.get_tensor(name).numpy().tobytes() for name in sorted(file.keys())}
    progress["curve"] = [(stage, steps, accuracy) for stage, steps, _, accuracy in progress["curve"]]
    return {**progress, "seconds": None}, tensors


@pytest.mark.parametrize("family", ["llava-vicuna", "qwen2-vl"])
def test_a_run_killed_at_any_moment_ends_as_an_undisturbed_one(family, tmp_path, monkeypatch):
    whole = tiny_trainer(family, tmp_path / "whole")
    start = {name: p.detach().clone() for name, p in whole.model.named_parameters()}
    whole.run()
    assert whole.stage is None and set(whole.progress.history) == {"symbols", "glyphs", "pages"}
    moved = [name for name, p in whole.model.named_parameters() if not torch.equal(p, start[name])]
    assert any("language_model" in name for name in moved) and any("vis" in name for name in moved)

    places = [(Trainer, "judge"), (torch.optim.AdamW, "step"), (Trainer, "save"), (train_module, "write_bytes_atomic")]
    for owner, name in places:
        original, calls = getattr(owner, name), itertools.count()

        def dying(*arguments, original=original, calls=calls, **options):
            if next(calls) == 2:
                raise Killed
            return original(*arguments, **options)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(owner, name, dying)
            tiny_trainer(family, tmp_path / "parts").run()
    tiny_trainer(family, tmp_path / "parts").run(steps=1)
    last = tiny_trainer(family, tmp_path / "parts")
    assert 0 < last.progress.total_steps < whole.progress.total_steps
    last.run()
    assert stored(last) == stored(whole)


def test_a_run_is_killed_and_goes_on(tmp_path):
    killed = tiny_trainer("llava-mistral", tmp_path / "killed")
    program = Path(inspect.getfile(tiny_trainer))
    process = subprocess.Popen([sys.executable, program, "llava-mistral", str(tmp_path / "killed")])
    try:
        while not killed.checkpoint.is_file():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    killed.load()
    whole = tiny_trainer("llava-mistral", tmp_path / "whole")
    for trainer in (killed, whole):
        trainer.run()
    assert stored(killed) == stored(whole)


def test_stages_change_only_what_they_train(tmp_path):
    trainer = tiny_trainer("llava-mistral", tmp_path)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.run(steps=2)
    assert trainer.stage.kind == "symbols"
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(parameter, start[name])
        assert moved == ("language_model" in name and "embed_tokens" not in name), name


def test_heldout_pages_end_stages_and_halve_the_learning_rate(tmp_path, monkeypatch):
    looks = iter([0.1, 0.3, 0.2, 0.3, 0.4, 0.3, 0.3, 0.2, 0.6])
    monkeypatch.setattr(Trainer, "heldout_accuracy", lambda self: next(looks))
    trainer = tiny_trainer("llava-mistral", tmp_path)
    trainer.stages = (replace(trainer.stages[0], enough=0.6), *trainer.stages[1:])
    seen = []
    while trainer.stage.name == "symbols":
        trainer.judge()
        seen.append((trainer.progress.best, trainer.progress.halvings))
    # Two looks without a better one halve; the second halving ends the stage.
    assert seen == [(0.1, 0), (0.3, 0), (0.3, 0), (0.3, 1), (0.4, 1), (0.4, 1), (0.0, 0)]
    trainer = tiny_trainer("llava-mistral", tmp_path)
    trainer.stages = (replace(trainer.stages[0], enough=0.6), *trainer.stages[1:])
    looks = iter([0.5, 0.6])
    trainer.judge()
    assert trainer.stage.name == "symbols"
    trainer.judge()
    assert trainer.stage.name == "glyphs"


def test_the_mean_weights_are_judged_and_put_back(tmp_path):
    trainer = tiny_trainer("qwen2-vl", tmp_path)
    trainer.run(steps=2)
    own = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(Killed), trainer.mean_weights():
        assert all(torch.equal(p, trainer.average[name]) for name, p in trainer.model.named_parameters())
        raise Killed
    assert all(torch.equal(p, own[name]) for name, p in trainer.model.named_parameters())
    assert any(not torch.equal(p, trainer.average[name]) for name, p in trainer.model.named_parameters())


@pytest.fixture
def tiny(monkeypatch):
    """Whatever trains, trains a tiny model with a tiny curriculum; its pages are not read."""

    def make(family, folder, *, seed, threads):
        return Trainer(
            family, folder, seed=seed, threads=threads, stages=STAGES, schedule=SCHEDULE, dims=tiny_dims(family)
        )

    reading = json.loads((ASSETS / "llava-vicuna" / "reading.json").read_text())
    monkeypatch.setattr(train_module, "Trainer", make)
    monkeypatch.setattr(export_module, "read_pages", lambda folder, **options: reading)
    yield make
    torch.set_num_threads(1)


def test_train_goes_on_from_its_own_checkpoint_only(tmp_path, tiny):
    assert train("llava-mistral", tmp_path, steps=1).progress.total_steps == 1
    assert train("llava-mistral", tmp_path, steps=1).progress.total_steps == 2
    assert train("llava-mistral", tmp_path, steps=1, fresh=True).progress.total_steps == 1
    for other in ({"family": "qwen2-vl"}, {"seed": 1}, {"threads": 2}):
        with pytest.raises(DataError, match="--fresh"):
            train(**{"family": "llava-mistral", "folder": tmp_path, **other})


def test_what_is_no_checkpoint_is_not_gone_on_from(tmp_path, tiny):
    place = tmp_path / "checkpoint.safetensors"
    train("llava-mistral", tmp_path, steps=1)
    with safe_open(place, "pt") as file:
        tensors, progress = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    some = dict(list(tensors.items())[1:])
    for content, message in (
        (b"", "is no checkpoint of a training"),
        (place.read_bytes()[:-100], "is no checkpoint of a training"),
        (save(tensors), "is no checkpoint of a training"),
        (save(tensors, {"progress": json.dumps({"steps": 3})}), "unexpected keyword argument 'steps'"),
        (save(some, progress), f"has no {next(iter(tensors))}; choose another folder, or --fresh"),
    ):
        place.write_bytes(content)
        with pytest.raises(DataError, match=message):
            train("llava-mistral", tmp_path, steps=1)


def test_the_command_trains_from_nothing_to_a_folder(tmp_path, tiny, monkeypatch):
    def run(*options):
        command = ["train", "--family", "llava-vicuna", "--folder", str(tmp_path), *options]
        return CliRunner().invoke(cli.app, command)

    stopped = run("--steps", "2")
    assert stopped.exit_code == 0 and "2 steps done, in stage symbols; the same command goes on" in stopped.output
    assert not (tmp_path / "llava-vicuna").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "judge", interrupt)
        interrupted = run()
    assert interrupted.exit_code == 130 and "the same command goes on" in interrupted.output
    assert run("--no-progress").exit_code == 0
    trainer = tiny("llava-vicuna", tmp_path, seed=0, threads=1)
    trainer.load()
    assert trainer.stage is None
    model = type(trainer.model).from_pretrained(tmp_path / "llava-vicuna", dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trainer.average[name].bfloat16()), name
    training = json.loads((tmp_path / "llava-vicuna" / "training.json").read_text())
    assert training["stage_under_way"] is None and training["steps"] == sum(training["steps_by_stage"].values())
    card = (tmp_path / "llava-vicuna" / "README.md").read_text()
    assert "--family llava-vicuna --seed 0 --threads 1` from nothing" in card and "the whole curriculum" in card


def test_an_unknown_family_is_an_error():
    with pytest.raises(ConfigError, match="gpt"):
        build_config("gpt")


def test_batches_are_functions_of_their_seed():
    mix = CURRICULUM[-1].mix
    first, again, other = (make_batch("qwen2-vl", mix, 3, (0, 1, seed)) for seed in (2, 2, 3))
    assert torch.equal(first.input_ids, again.input_ids) and torch.equal(first.labels, again.labels)
    assert first.input_ids.shape != other.input_ids.shape or not torch.equal(first.input_ids, other.input_ids)


def test_labels_are_the_tokens_that_follow_and_slips_are_seen_only():
    mix = replace(CURRICULUM[-1].mix, slips=0.3)
    heldout, train = (make_batch("llava-vicuna", mix, 8, (0, 0, 0), split=split) for split in ("heldout", "train"))
    ends = tokenizer_of("llava-vicuna").eos_token_id  # the last one is answered, and goes nowhere
    known = (heldout.labels[:, :-1] != IGNORE) & (heldout.labels[:, :-1] != ends)
    assert torch.equal(heldout.labels[:, :-1][known], heldout.input_ids[:, 1:][known])
    # In training some of the characters that an answer goes on from are wrong; nothing else is.
    known = (train.labels[:, :-1] != IGNORE) & (train.labels[:, :-1] != ends)
    labels, following = train.labels[:, :-1][known], train.input_ids[:, 1:][known]
    wrong = labels != following
    assert 0.2 < wrong.float().mean() < 0.4
    assert max(labels[wrong].max(), following[wrong].max()) < 36


@pytest.mark.parametrize("family", FAMILIES)
def test_a_form_is_asked_for_all_its_fields_in_one_conversation(family):
    tokenizer = tokenizer_of(family)
    rng = np.random.default_rng(0)
    layout = draw_layout(rng, Mix(14, 14, most_fields=4, field_share=1.0), "train")
    ids, answers = whole_conversation(family, layout, rng)
    values = {word.text[:-1]: value.text for word, value in zip(layout.words[::2], layout.words[1::2], strict=True)}
    # What the family's own template makes of the same turns, a turn at a time.
    _, *turns = tokenizer.decode(ids).split("What is the ")
    assert len(turns) == len(values) == layout.num_words
    assert turns[0].startswith(layout.prompt.removeprefix("What is the "))
    messages, labelled = [], []
    for number, turn in enumerate(turns):
        label = turn.partition("?")[0]
        text = {"type": "text", "text": field_prompt(label)}
        messages.append({"role": "user", "content": [{"type": "image"}, text] if number == 0 else [text]})
        messages.append({"role": "assistant", "content": values[label]})
        labelled += [*tokenizer.encode(values[label]), tokenizer.eos_token_id]
    text = tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATES[family], tokenize=False)
    before, after = map(tokenizer.encode, text.split(tokenizer.image_token))
    after = after[: len(after) - after[::-1].index(tokenizer.eos_token_id)]  # a template may close with a line break
    assert ids[: len(before)] == before and ids[-len(after) :] == after
    assert [token for token in answers if token != IGNORE] == labelled


# ---- the committed checkpoints ---------------------------------------------------------------------------------------


def test_miniatures_are_shipped():
    assert set(SHIPPED) >= {"llava-vicuna", "llava-mistral", "qwen2-vl", "qwen3-vl"}


@pytest.mark.parametrize("family", SHIPPED)
def test_shipped_folder_is_complete_and_small(family):
    folder = ASSETS / family
    for name in ("config.json", "generation_config.json", "tokenizer.json", "processor_config.json", "README.md"):
        assert (folder / name).is_file(), name
    assert (folder / "chat_template.jinja").is_file()
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= (12 if "wide" in family else 8) * 10**6
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    assert text["num_hidden_layers"] >= 4 and text["num_attention_heads"] >= 8
    reading = json.loads((folder / "reading.json").read_text())
    assert reading["split"] == "heldout" and set(reading["tasks"]) == {"read", "field"}
    if family in QWEN:
        assert "video_processor" in json.loads((folder / "processor_config.json").read_text())


@pytest.mark.parametrize("family", SHIPPED)
def test_shipped_miniature_reads_heldout_pages(family):
    from sparsemm.miniatures.reading import answers
    from sparsemm.models import load_model

    model, processor = load_model(ASSETS / family)
    pages = [page_of(family, i, seed=77) for i in range(12)]
    texts = answers(model, processor, pages)
    accuracy = np.mean([character_accuracy(text, page.answer) for text, page in zip(texts, pages, strict=True)])
    # Well under what reading.json reports over hundreds of pages, far over what guessing gets.
    assert accuracy > 0.75
    # It is the image that is read: with another page's image the same questions go wrong.
    swapped = [replace(page, image=other.image) for page, other in zip(pages, pages[1:] + pages[:1], strict=True)]
    wrong = answers(model, processor, swapped)
    blind = np.mean([character_accuracy(text, page.answer) for text, page in zip(wrong, pages, strict=True)])
    assert blind < accuracy - 0.4
