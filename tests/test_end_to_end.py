"""The committed miniatures under the patch: trained weights, real prompts, the interfaces people use."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from greedy_runs import greedy
from transformers import TextIteratorStreamer, pipeline

import sparsemm
from sparsemm.documents import make_page
from sparsemm.models import family_of

ROOT = Path(__file__).resolve().parents[1]
MINIATURES = sorted(
    path.name for path in (ROOT / "assets" / "miniatures").iterdir() if (path / "config.json").is_file()
)
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=MINIATURES)
def miniature(request):
    model, processor = sparsemm.load_model(ROOT / "assets" / "miniatures" / request.param, device="cpu")
    return request.param, model, processor


def pages(count):
    return [
        make_page(index, split="heldout", task=("read", "field")[index % 2], num_words=2 + index % 3, seed=7)
        for index in range(count)
    ]


def inputs_of(model, processor, chosen):
    return family_of(model).build_inputs(processor, [page.image for page in chosen], [page.prompt for page in chosen])


def configs(name, budget):
    table = ROOT / "head_scores" / f"{name}.json"
    for method in ("fullkv", "snapkv", "pyramidkv", "adakv", "sparsemm", "random"):
        scores = table if method == "sparsemm" else None
        yield sparsemm.CompressionConfig(method=method, budget=budget, head_scores=scores, window_size=4)


def test_a_budget_that_covers_the_prompt_changes_nothing(miniature):
    name, model, processor = miniature
    for count in (1, 3):
        inputs = inputs_of(model, processor, pages(count))
        expected_ids, expected, _ = greedy(model, inputs, 12)
        limit = TOLERANCE * max(1.0, expected.abs().max().item())
        for settings in configs(name, inputs["input_ids"].shape[1]):
            with sparsemm.patch(model, settings):
                ids, logits, _ = greedy(model, inputs, 12)
            assert torch.equal(ids, expected_ids), settings.method
            assert (logits - expected).abs().max() <= limit, settings.method


def test_small_budgets_hold_what_they_say(miniature):
    name, model, processor = miniature
    text = model.config.text_config
    inputs = inputs_of(model, processor, pages(3))
    for settings in configs(name, 16):
        if settings.method == "fullkv":
            continue
        with sparsemm.patch(model, settings, reserve=1) as handle:
            greedy(model, inputs, 2)
        stats = handle.stats
        assert stats.kept_rows.sum((1, 2)).tolist() == [16 * text.num_hidden_layers * text.num_key_value_heads] * 3
        assert stats.cache_bytes < 0.15 * stats.full_cache_bytes


def test_the_pipeline_works_under_the_patch(miniature):
    name, model, processor = miniature
    page = pages(1)[0]
    messages = [
        {"role": "user", "content": [{"type": "image", "image": page.image}, {"type": "text", "text": page.prompt}]}
    ]
    reader = pipeline("image-text-to-text", model=model, processor=processor)
    settings = dict(return_full_text=False, generate_kwargs={"do_sample": False, "max_new_tokens": 8})
    expected = reader(text=messages, **settings)[0]["generated_text"]
    length = inputs_of(model, processor, [page])["input_ids"].shape[1]
    with sparsemm.patch(model, sparsemm.CompressionConfig(method="snapkv", budget=length, window_size=4)) as handle:
        assert reader(text=messages, **settings)[0]["generated_text"] == expected
        assert handle.stats.prompt_tokens == [length]


def test_streaming_works_under_the_patch(miniature):
    name, model, processor = miniature
    inputs = inputs_of(model, processor, pages(1))
    settings = dict(max_new_tokens=8, do_sample=False)
    with sparsemm.patch(model, sparsemm.CompressionConfig(method="adakv", budget=24, window_size=4)):
        ids = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        worker = threading.Thread(target=model.generate, kwargs={**inputs, **settings, "streamer": streamer})
        worker.start()
        streamed = "".join(streamer)
        worker.join()
    assert streamed.strip() == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_a_second_question_about_the_same_page(miniature):
    """Two turns through `generate`: with everything kept, the text of the unpatched model."""
    name, model, processor = miniature
    page = make_page(3, split="heldout", task="field", num_words=3, seed=9)
    first = inputs_of(model, processor, [page])

    def two_turns():
        out = model.generate(**first, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        follow = processor.tokenizer(" " + page.prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = torch.cat([out.sequences, follow], dim=1)
        rest = {key: value for key, value in first.items() if key in ("image_grid_thw", "image_sizes")}
        if "mm_token_type_ids" in first:
            types = first["mm_token_type_ids"]
            rest["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, ids.shape[1] - types.shape[1]))
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **rest}
        return model.generate(**again, past_key_values=out.past_key_values, max_new_tokens=5, do_sample=False)

    with torch.no_grad():
        expected = two_turns()
        with sparsemm.patch(model, sparsemm.CompressionConfig(method="fullkv")):
            assert torch.equal(two_turns(), expected)
