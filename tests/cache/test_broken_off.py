"""A forward is all or nothing: after an exception at any layer the cache is as it was, or says so at its next use."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from graph_emulation import EmulatedGraphs
from greedy_runs import config, text_inputs
from interruptions import broken_off, feed, places
from toy_models import FAMILIES, toy_inputs, toy_model

import sparsemm
from sparsemm.decoding import DecodeLoop, loop
from sparsemm.errors import CacheError


def state(cache):
    return [(layer.seen, layer.lens.tolist(), layer.room >= 0) for layer in cache.layers], cache.memory_bytes()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_prompt_that_breaks_off_leaves_an_empty_cache(family, layer):
    model = toy_model(family, num_layers=3)
    inputs = toy_inputs(model, 2)
    with sparsemm.patch(model, config("snapkv", 12)) as handle, torch.no_grad():
        expected = model(**inputs, use_cache=True)
        for place in places(model, layer):
            cache = handle.new_cache()
            with broken_off(place, KeyboardInterrupt):
                model(**inputs, past_key_values=cache)
            assert [each.get_seq_length() for each in cache.layers] == [0, 0, 0]
            assert cache.get_seq_length() == 0 and cache.memory_bytes() == 0 and cache.batch_size == -1
            with pytest.raises(CacheError, match="no prompt"):
                _ = handle.stats
            again = model(**inputs, past_key_values=cache)
            assert torch.equal(again.logits, expected.logits)
            assert state(cache) == state(expected.past_key_values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", [1, 3, 20])
@pytest.mark.parametrize("every", [False, True])
def test_a_turn_that_breaks_off_is_taken_back(family, width, every):
    """One row of the batch is padded, some of the new columns too; buffers are full, so they grow meanwhile."""
    model = toy_model(family, num_layers=3)
    inputs = text_inputs(30, batch=2)
    inputs["attention_mask"][0, :4] = 0
    turn = text_inputs(width, batch=2, seed=1)["input_ids"].tolist()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, width, dtype=torch.long)], dim=1)
    mask[1, 30 : 30 + width // 2] = 0
    settings = config("adakv", 60 if every else 12, compress_turns="every" if every else "first")  # 60: all kept
    with sparsemm.patch(model, settings, reserve=1) as handle:
        cache = handle.new_cache()
        feed(model, cache, inputs["input_ids"].tolist(), inputs["attention_mask"])
        lengths, stats = [layer.lens.clone() for layer in cache.layers], handle.stats
        expected = feed(model, copy.deepcopy(cache), turn, mask)
        for place in places(model, 1):
            for kind in (RuntimeError, KeyboardInterrupt):
                with broken_off(place, kind):
                    feed(model, cache, turn, mask)
                assert [layer.get_seq_length() for layer in cache.layers] == [30, 30, 30]
                assert all(torch.equal(layer.lens, lens) for layer, lens in zip(cache.layers, lengths, strict=True))
                assert torch.equal(handle.stats.kept_rows, stats.kept_rows)
                assert handle.stats.prompt_tokens == stats.prompt_tokens
                assert handle.stats.full_cache_bytes == stats.full_cache_bytes
        assert torch.equal(feed(model, cache, turn, mask), expected)
        cache.crop(-width)
        assert all(torch.equal(layer.lens, lens) for layer, lens in zip(cache.layers, lengths, strict=True))
        if not every:
            with pytest.raises(CacheError, match="only the last 0 "):
                cache.crop(-1)


def test_what_was_compressed_again_cannot_come_back():
    model = toy_model("llava-vicuna", num_layers=3)
    turn = text_inputs(9, seed=1)["input_ids"].tolist()
    with sparsemm.patch(model, config("snapkv", 12, compress_turns="every")) as handle:
        cache = handle.new_cache()
        feed(model, cache, text_inputs(30)["input_ids"].tolist())
        with broken_off(model.model.language_model.layers[1].mlp):
            feed(model, cache, turn)
        for use in (
            lambda: feed(model, cache, turn),
            lambda: cache.crop(-1),
            lambda: cache.reorder_cache(torch.tensor([0])),
            lambda: cache.batch_select_indices(torch.tensor([0])),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.begin_steps(),
            lambda: cache.grow(1),
            lambda: cache.get_seq_length(),
            lambda: copy.deepcopy(cache).crop(-1),
            lambda: model.generate(**text_inputs(40), max_new_tokens=2, past_key_values=cache),
        ):
            with pytest.raises(CacheError, match="left in the middle of a forward .* empty it with reset"):
                use()
        cache.reset()
        feed(model, cache, text_inputs(30)["input_ids"].tolist())
        assert handle.stats.effective_budget == 12


@pytest.mark.parametrize("fails", ["key_buffer", "value_buffer"])
def test_memory_that_runs_out_while_a_buffer_grows(monkeypatch, fails):
    """Before the first buffer of a layer has moved nothing is lost; between the two it is said."""
    model = toy_model("llava-mistral")
    with sparsemm.patch(model, config("snapkv", 12), reserve=1) as handle:
        cache = handle.new_cache()
        feed(model, cache, text_inputs(30)["input_ids"].tolist())
        expected = feed(model, copy.deepcopy(cache), [[5, 6, 7]])
        buffers, original = [], torch.Tensor.index_copy_

        def index_copy(self, *args):
            buffers.append(self)
            if len(buffers) == {"key_buffer": 3, "value_buffer": 4}[fails]:  # of the second layer
                raise torch.OutOfMemoryError("broken off")
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, "index_copy_", index_copy)
        with pytest.raises(torch.OutOfMemoryError):
            feed(model, cache, [[5, 6, 7]])
        monkeypatch.undo()
        if fails == "value_buffer":
            with pytest.raises(CacheError, match="left in the middle"):
                cache.get_seq_length()
        else:
            assert torch.equal(feed(model, cache, [[5, 6, 7]]), expected)


def test_layers_that_differ_are_noticed():
    """Whatever brought them there: each use looks at all layers."""
    model = toy_model("llava-vicuna", num_layers=3)
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        cache = handle.new_cache()
        feed(model, cache, text_inputs(30)["input_ids"].tolist())
        cache.layers[2].seen -= 1
        for use in (
            lambda: feed(model, cache, [[5]]),
            lambda: cache.crop(-1),
            lambda: cache.reorder_cache(torch.tensor([0])),
            lambda: cache.batch_select_indices(torch.tensor([0])),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.begin_steps(),
        ):
            with pytest.raises(CacheError, match=r"hold \[30, 30, 29\] columns where 30 were fed"):
                use()


def test_a_crop_that_breaks_off_is_noticed(monkeypatch):
    model = toy_model("llava-vicuna")
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        cache = handle.new_cache()
        feed(model, cache, text_inputs(30)["input_ids"].tolist())
        feed(model, cache, [[5, 6]])

        def interrupted(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(cache.layers[1], "restore", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.crop(-1)
        with pytest.raises(CacheError, match="left in the middle of crop"):
            cache.get_seq_length()


class InterruptedGraphs(EmulatedGraphs):
    """Replays that stop in the middle of the third."""

    def capture(self, body):
        replay, self.stop_at = super().capture(body), None

        def interrupted():
            if self.replays == 2:
                ops = torch.ops.sparsemm
                count, appending = [0], (ops.append.default, ops.rope_append.default)

                class Stop(torch.utils._python_dispatch.TorchDispatchMode):
                    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                        if func in appending:
                            count[0] += 1
                            if count[0] == 2:  # the first layer has one row more than the second
                                raise KeyboardInterrupt("broken off")
                        return func(*args, **(kwargs or {}))

                with Stop():
                    replay()
            replay()

        return interrupted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("captured", [False, True])
def test_generation_interrupted_inside_a_step_goes_on_as_if_it_had_not_been(family, captured, monkeypatch):
    model = toy_model(family)
    inputs = toy_inputs(model, 2)
    with sparsemm.patch(model, config("snapkv", 12)) as handle:
        whole = sparsemm.generate(model, inputs, max_new_tokens=12)
        run = DecodeLoop(handle, reserve=3)
        with contextlib.ExitStack() as stack:
            if captured:
                monkeypatch.setattr(loop, "CudaGraphs", InterruptedGraphs)
                run.graph = True
                stack.enter_context(pytest.raises(KeyboardInterrupt))
            else:
                place = model.model.language_model.layers[1].mlp
                stack.enter_context(
                    broken_off(place, KeyboardInterrupt, after=6)
                )  # the prompt, both sides of the comparison, three steps
            model.generate(**inputs, max_new_tokens=12, custom_generate=run)
        columns = inputs["input_ids"].shape[1] + 3
        assert run.cache.get_seq_length() == columns
        assert {layer.get_seq_length() for layer in run.cache.layers} == {columns}
        rows = [layer.lens - layer.prompt_rows for layer in run.cache.layers]
        assert {int(number) for each in rows for number in each} == {3}
        ids = whole.sequences[:, : columns + 1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
        rest = model.generate(input_ids=ids, attention_mask=mask, past_key_values=run.cache, max_new_tokens=8)
    assert torch.equal(rest, whole.sequences)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_budgets_from_all_layers_stay_until_the_last_has_run(family):
    """Every layer holds the whole prompt until then; a forward that breaks off behind it leaves nothing, waits for
    nothing, and a later turn of `every` chooses again."""
    model = toy_model(family, num_layers=3)
    inputs, held = toy_inputs(model, 2), []
    text = model.config.text_config
    whole = int(inputs["attention_mask"].sum()) * text.num_key_value_heads
    with sparsemm.patch(model, config("vl_cache", 12, compress_turns="every")) as handle, torch.no_grad():
        handle.observer = lambda index, query, layer: held.append(int(layer.lens.sum()))
        cache = handle.new_cache()
        with broken_off(model.model.language_model.norm):
            model(**inputs, past_key_values=cache)
        assert held == [whole] * 3 and cache.get_seq_length() == 0
        assert all(layer.waiting is None for layer in cache.layers)
        model(**inputs, past_key_values=cache)
        assert held[3:] == [whole] * 3 and [int(layer.lens.sum()) for layer in cache.layers] != [whole] * 3
        kept = handle.stats.kept_rows
        assert (kept.sum((1, 2)) == 12 * 3 * text.num_key_value_heads).all()
        before = state(cache)
        columns = inputs["input_ids"].shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 20, dtype=torch.long)], dim=1)
        turn = [[20 + index for index in range(20)]] * 2
        with broken_off(model.model.language_model.norm):
            feed(model, cache, turn, mask)
        assert state(cache)[0] == before[0] and all(layer.waiting is None for layer in cache.layers)
        feed(model, cache, turn, mask)
        assert cache.get_seq_length() == columns + 20
        assert (handle.stats.kept_rows.sum((1, 2)) <= 12 * 3 * text.num_key_value_heads).all()
