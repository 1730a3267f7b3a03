"""Whatever is done to a cache, each of its rows reads as that row does alone, fed anew into an empty cache."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
from graph_emulation import EmulatedGraphs
from greedy_runs import config, reachable_bytes, scores
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from toy_models import FAMILIES, single_row, toy_inputs, toy_model

import sparsemm
from sparsemm.decoding import DecodeStep, StepRunner
from sparsemm.errors import CacheError

EXAMPLES, STEPS = 16, 10
TOLERANCE = 1e-5
METHODS = ("fullkv", "snapkv", "pyramidkv", "adakv", "sparsemm", "expected_attention", "vl_cache")
tokens_of = st.integers(10, 60)


@dataclass
class Conversation:
    """A cache, and what every one of its batch rows was fed."""

    cache: sparsemm.SparseCache
    prompts: list = field(default_factory=list)  # of each row: token ids, or the key of an image prompt
    turns: list = field(default_factory=list)  # of each row: the tokens of each later forward
    columns: list = field(default_factory=list)  # of each row: whether each column is a token
    deltas: list = field(default_factory=list)  # of each row: offset of positions (M-RoPE)
    frozen: int = 0  # columns that cannot be taken back
    images: bool = False

    def __repr__(self):
        return f"<{len(self.prompts)} rows, {self.count} columns>"

    @property
    def count(self):
        return len(self.columns[0]) if self.columns else 0

    def tokens(self, row):
        return sum(self.columns[row])

    def select(self, rows):
        for name in ("prompts", "turns", "columns", "deltas"):
            values = getattr(self, name)
            setattr(self, name, [copy.deepcopy(values[row]) for row in rows])


class Broken(BaseException):
    """Raised in the middle of a forward."""


class Machine(RuleBasedStateMachine):
    model = None  # set by the test, with the image prompts and what rows read alone

    def __init__(self):
        super().__init__()
        self.handle = None
        self.alive: list[Conversation] = []

    def teardown(self):
        if self.handle is not None:
            self.handle.remove()

    # -- what is done -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.handle is None)
    @rule(
        method=st.sampled_from(METHODS),
        every=st.booleans(),
        budget=st.sampled_from([9, 14, 40]),
        reserve=st.sampled_from([1, 3, 64]),
    )
    def patch(self, method, every, budget, reserve):
        table = scores(self.model) if method == "sparsemm" else None
        turns = "every" if every else "first"
        settled = config(method, None if method == "fullkv" else budget, head_scores=table, compress_turns=turns)
        self.handle = sparsemm.patch(self.model, settled, reserve=reserve)

    @precondition(lambda self: self.handle is not None and len(self.alive) < 2)
    @rule(rows=st.lists(st.lists(tokens_of, min_size=1, max_size=25), min_size=1, max_size=3), data=st.data())
    def text_prompt(self, rows, data):
        self._prompt(data, Conversation(self.handle.new_cache()), rows)

    @precondition(lambda self: self.handle is not None and len(self.alive) < 2)
    @rule(batch=st.integers(1, 3))
    def image_prompt(self, batch):
        inputs, deltas = self.image_prompts[batch]
        conversation = Conversation(self.handle.new_cache(), images=True)
        with torch.no_grad():
            extra = {} if "qwen" in self.model.config.model_type else {"position_ids": _positions(inputs)}
            logits = self.model(**inputs, **extra, past_key_values=conversation.cache).logits
        conversation.prompts = [(batch, row) for row in range(batch)]
        conversation.deltas = list(deltas)
        self._started(conversation, inputs["attention_mask"].bool().tolist(), logits)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), width=st.integers(1, 20))
    def chunk(self, data, width):
        """Columns of which each row fills any, in any places."""
        conversation = self._choose(data)
        rows = [
            data.draw(st.lists(st.none() | tokens_of, min_size=width, max_size=width)) for _ in conversation.prompts
        ]
        if data.draw(st.booleans()):
            rows = [[12 if token is None else token for token in row] for row in rows]
        self._feed(data, conversation, rows)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def decode(self, data):
        conversation = self._choose(data)
        self._feed(data, conversation, [[data.draw(tokens_of)] for _ in conversation.prompts])

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), captured=st.booleans(), number=st.integers(1, 5))
    @torch.no_grad()
    def steps(self, data, captured, number):
        """Decode steps without host work, replayed or not, of which the last may break off."""
        conversation = self._choose(data)
        cache, batch = conversation.cache, len(conversation.prompts)
        last = torch.tensor([conversation.tokens(row) - 1 + conversation.deltas[row] for row in range(batch)])
        last = last[:, None].expand(*((3,) if hasattr(self.model.model, "rope_deltas") else ()), batch, 1)
        step = DecodeStep(self.model, cache, last, torch.zeros(batch, 128))
        runner = StepRunner(step, cache, EmulatedGraphs("cpu") if captured else None, growth=2)
        for _ in range(number):
            tokens = [[data.draw(tokens_of)] for _ in range(batch)]
            step.token.copy_(torch.tensor(tokens))
            runner()
            self._fed(conversation, tokens)
            self._compare(conversation, step.logits[:, None], range(batch))
        if not captured and data.draw(st.booleans()):
            with self._broken_off(data):
                runner()
        else:
            runner.finish()

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), columns=st.integers(1, 12))
    def crop(self, data, columns):
        conversation = self._choose(data)
        removable = conversation.count - conversation.frozen
        if columns > removable:
            with pytest.raises(CacheError, match=f"only the last {removable} "):
                conversation.cache.crop(-columns)
            return
        prompt = conversation.count - max(sum(map(len, turns)) for turns in conversation.turns)
        emptied = not all(any(places[:-columns]) for places in conversation.columns)
        if emptied or (conversation.images and conversation.count - columns < prompt):
            return
        conversation.cache.crop(-columns)
        for row, places in enumerate(conversation.columns):
            for is_token in reversed(places[-columns:]):
                if is_token:
                    turns = conversation.turns[row]
                    (turns[-1] if turns else conversation.prompts[row]).pop()
                    if turns and not turns[-1]:
                        turns.pop()
            del places[-columns:]

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), how=st.sampled_from(["reorder_cache", "batch_select_indices"]))
    def select(self, data, how):
        conversation = self._choose(data)
        row = st.integers(0, len(conversation.prompts) - 1)
        rows = data.draw(st.lists(row, min_size=1, max_size=4))
        getattr(conversation.cache, how)(torch.tensor(rows))
        conversation.select(rows)

    @precondition(lambda self: any(len(each.prompts) < 3 for each in self.alive))
    @rule(data=st.data())
    def repeat(self, data):
        conversation = data.draw(st.sampled_from([each for each in self.alive if len(each.prompts) < 3]))
        conversation.cache.batch_repeat_interleave(2)
        conversation.select([row for row in range(len(conversation.prompts)) for _ in range(2)])

    @precondition(lambda self: len(self.alive) == 1)
    @rule(data=st.data())
    def copy(self, data):
        self.alive.append(copy.deepcopy(self.alive[0]))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def broken_off(self, data):
        """An exception at some layer of a turn: the cache is as it was, or refuses to be used."""
        conversation = self._choose(data)
        width = data.draw(st.sampled_from([1, 3, 18]))
        batch = len(conversation.prompts)
        rows = [data.draw(st.lists(tokens_of, min_size=width, max_size=width)) for _ in range(batch)]
        before = [layer.lens.clone() for layer in conversation.cache.layers]
        with self._broken_off(data):
            self._forward(data, conversation, rows)
        try:
            assert conversation.cache.get_seq_length() == conversation.count
        except CacheError:
            assert width > 1 and self.handle.config.compress_turns == "every"
            for use in (lambda cache: cache.crop(-1), lambda cache: cache.batch_repeat_interleave(2),
                        lambda cache: cache.begin_steps(), lambda cache: cache.reorder_cache(torch.arange(batch)),
                        lambda cache: self._forward(data, conversation, rows)):  # fmt: skip
                with pytest.raises(CacheError, match="middle of a forward"):
                    use(conversation.cache)
            conversation.cache.reset()
            self.alive.remove(conversation)
        else:
            for layer, lens in zip(conversation.cache.layers, before, strict=True):
                assert torch.equal(layer.lens, lens)

    @precondition(lambda self: self.handle is not None and len(self.alive) < 2)
    @rule(rows=st.lists(st.lists(tokens_of, min_size=1, max_size=25), min_size=1, max_size=3), data=st.data())
    def broken_off_prompt(self, rows, data):
        conversation = Conversation(self.handle.new_cache())
        with self._broken_off(data):
            self._prompt(data, conversation, rows)
        assert conversation.cache.get_seq_length() == 0 and conversation.cache.memory_bytes() == 0
        self._prompt(data, conversation, rows)

    # -- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def accounts(self):
        for conversation in self.alive:
            cache, batch = conversation.cache, len(conversation.prompts)
            assert cache.get_seq_length() == conversation.count and cache.batch_size == batch
            assert {layer.get_seq_length() for layer in cache.layers} == {conversation.count}
            assert not any(bool(layer.overflow) for layer in cache.layers)
            assert cache.memory_bytes() == reachable_bytes(cache)
            stats = cache.record.stats()
            rows = sum(conversation.tokens(row) for row in range(batch))
            layer = cache.layers[0]
            row_bytes = 2 * layer.key_buffer.shape[1] * layer.key_buffer.element_size()
            assert stats.full_cache_bytes == rows * row_bytes * len(cache.layers) * self.handle.plan.num_kv_heads
            for layer in cache.layers:
                assert bool((layer.lens + layer.room <= layer.offsets.diff()).all())
            assert bool((stats.kept_rows <= torch.tensor(stats.prompt_tokens)[:, None, None]).all())
            if cache.rope_deltas is not None:
                assert cache.rope_deltas[:, 0].tolist() == conversation.deltas

    # -- how ----------------------------------------------------------------------------------------------------------

    def _choose(self, data):
        return data.draw(st.sampled_from(self.alive))

    def _prompt(self, data, conversation, rows):
        width = max(map(len, rows)) + data.draw(st.integers(0, 2))
        columns = [data.draw(_places(len(row), width)) for row in rows]
        ids, mask = _laid_out(rows, columns)
        with torch.no_grad():
            positions = _positions({"attention_mask": mask})
            logits = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=conversation.cache
            ).logits
        conversation.prompts = [list(row) for row in rows]
        conversation.deltas = [0] * len(rows)
        self._started(conversation, columns, logits)

    def _started(self, conversation, columns, logits):
        conversation.columns = [list(row) for row in columns]
        conversation.turns = [[] for _ in columns]
        self._note_dropped(conversation)
        self._compare(conversation, logits, range(len(columns)))
        self.alive.append(conversation)

    def _note_dropped(self, conversation):
        batch = len(conversation.prompts)
        tokens = torch.tensor([conversation.tokens(row) for row in range(batch)])[:, None]
        lens = [layer.lens.view(batch, -1) for layer in conversation.cache.layers]
        if any(bool((each < tokens).any()) for each in lens):
            conversation.frozen = conversation.count

    def _feed(self, data, conversation, rows):
        if all(token is None for row in rows for token in row):
            return
        again = len(rows[0]) > 1 and self.handle.config.compress_turns == "every"
        held = [layer.lens.clone() for layer in conversation.cache.layers]
        logits = self._forward(data, conversation, rows)
        self._fed(conversation, rows)
        if again:
            new = torch.tensor([sum(token is not None for token in row) for row in rows])
            new = new.repeat_interleave(self.handle.plan.num_kv_heads)
            layers = zip(conversation.cache.layers, held, strict=True)
            if any(bool((layer.lens < before + new).any()) for layer, before in layers):
                conversation.frozen = conversation.count
        filled = [row for row, tokens in enumerate(rows) if any(token is not None for token in tokens)]
        self._compare(conversation, logits, filled)

    def _fed(self, conversation, rows):
        for row, tokens in enumerate(rows):
            conversation.columns[row] += [token is not None for token in tokens]
            if any(token is not None for token in tokens):
                conversation.turns[row].append([token for token in tokens if token is not None])

    def _forward(self, data, conversation, rows):
        columns = [[token is not None for token in row] for row in rows]
        ids, _ = _laid_out([[token for token in row if token is not None] for row in rows], columns)
        seen = conversation.columns
        mask = torch.tensor([before + new for before, new in zip(seen, columns, strict=True)]).long()
        deltas = torch.tensor(conversation.deltas)[:, None]
        positions = ((mask.cumsum(1) - 1)[:, conversation.count :] + deltas).clamp(min=0)
        arguments = {"attention_mask": mask, "position_ids": positions}
        if bool(mask.all()) and data.draw(st.booleans()):
            arguments = {}  # the model is to find the positions by itself
        with torch.no_grad():
            return self.model(input_ids=ids, **arguments, past_key_values=conversation.cache).logits

    def _broken_off(self, data):
        text_model = self.model.model.language_model
        layer = text_model.layers[data.draw(st.integers(0, len(text_model.layers) - 1))]
        places = {
            "attention": layer.self_attn,
            "output": layer.self_attn.o_proj,
            "mlp": layer.mlp,
            "norm": text_model.norm,
        }
        module = places[data.draw(st.sampled_from(list(places)))]
        kind = data.draw(st.sampled_from([RuntimeError, KeyboardInterrupt, Broken]))
        return _Raising(module, kind)

    def _compare(self, conversation, logits, rows):
        """The logits of each row's last token."""
        for row in rows:
            last = max(place for place in range(logits.shape[1]) if conversation.columns[row][place - logits.shape[1]])
            expected = self._alone(conversation.prompts[row], conversation.turns[row])
            assert float((logits[row, last] - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())

    def _alone(self, prompt, turns):
        """Logits of the last token of a row fed by itself."""
        if self.handle.config.compress_turns == "first" and turns:
            turns = [[token for turn in turns for token in turn]]
        key = (self.handle.config.method, self.handle.config.budget, str(self.handle.config.compress_turns))
        key = (key, str(prompt), str(turns))
        if key not in self.known:
            with torch.no_grad():
                if isinstance(prompt, tuple):
                    inputs, deltas = self.image_prompts[prompt[0]]
                    inputs, delta = single_row(inputs, prompt[1]), deltas[prompt[1]]
                else:
                    inputs, delta = {"input_ids": torch.tensor([prompt])}, 0
                out = self.model(**inputs, use_cache=True)
                seen = inputs["input_ids"].shape[1]
                for turn in turns:
                    positions = torch.arange(seen, seen + len(turn))[None] + delta
                    out = self.model(
                        input_ids=torch.tensor([turn]), position_ids=positions, past_key_values=out.past_key_values
                    )
                    seen += len(turn)
            self.known[key] = out.logits[0, -1]
        return self.known[key]


class _Raising:
    """A context in which a module raises, and that expects it."""

    def __init__(self, module, kind):
        self.module, self.kind = module, kind

    def __enter__(self):
        def broken(*_):
            raise self.kind("broken off")

        self.hook = self.module.register_forward_pre_hook(broken)

    def __exit__(self, kind, error, trace):
        self.hook.remove()
        assert kind is self.kind, "the exception got lost"
        return True


@st.composite
def _places(draw, tokens, width):
    """Which of `width` columns hold `tokens` tokens."""
    chosen = draw(st.lists(st.integers(0, width - 1), min_size=width - tokens, max_size=width - tokens, unique=True))
    return [place not in chosen for place in range(width)]


def _laid_out(rows, columns):
    ids = torch.zeros(len(rows), len(columns[0]), dtype=torch.long)
    mask = torch.tensor(columns)
    for row, tokens in enumerate(rows):
        ids[row, mask[row]] = torch.tensor(tokens, dtype=torch.long)
    return ids, mask.long()


def _positions(inputs):
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_read_as_if_fed_alone(family):
    model = toy_model(family, dtype=torch.float64)
    prompts = {}
    for batch in (1, 2, 3):
        inputs = toy_inputs(model, batch)
        deltas = [0] * batch
        if hasattr(model.model, "rope_deltas"):
            names = ("input_ids", "image_grid_thw", "attention_mask", "mm_token_type_ids")
            deltas = model.model.get_rope_index(**{name: inputs[name] for name in names})[1][:, 0].tolist()
        prompts[batch] = (inputs, deltas)
    machine = type("MachineOf" + family, (Machine,), {"model": model, "image_prompts": prompts, "known": {}})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
