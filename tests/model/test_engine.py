"""The engine: prefill and decode equal one forward pass, however tokens, pages and requests are arranged."""

import itertools

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keye_model import Engine, Prompt, SamplingParams
from keye_model.cache import PAGE_SIZE, OutOfPages, PagedCache, Pages, pages_for
from keye_model.graphs import DecodeBuffers, DecodeGraphs
from keye_model.sampling import choose

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def text_prompt(length, seed=0):
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return Prompt(torch.randint(0, 280, (length,), generator=generator))


def picture_prompt(before=5, after=70):
    """Text, an image of 4 x 6 patches, text, two frames of 4 x 4, text."""
    ids = [3] * before + [tiny.IMAGE] * 6 + [7] * 20 + [tiny.VIDEO] * 8 + list(range(after))
    return Prompt(torch.tensor(ids), None, torch.randn(56, 3, 14, 14), [(1, 4, 6), (2, 4, 4)])


def full_pass(model, prompt, tokens):
    """Logits of the generated tokens' predecessors, from one forward pass over everything."""
    device = model.decoder.embed.weight.device
    ids = torch.cat([prompt.input_ids, torch.tensor(tokens[:-1], dtype=torch.int64)]).to(device)
    cu = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
    pixels = None if prompt.pixel_values is None else prompt.pixel_values.to(device)
    positions = torch.arange(len(ids), device=device).expand(3, -1)
    with torch.no_grad():
        hidden = model(ids, positions, cu, len(ids), pixel_values=pixels, grids=prompt.grids).hidden
        return model.head(hidden[-len(tokens) :]).float()


def assert_follows(model, prompt, completion):
    """Greedy tokens are the full pass's choice up to ties of rounding, with its log-probabilities."""
    logits = full_pass(model, prompt, completion.tokens).cpu()
    chosen = logits.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
    assert (logits.amax(1) - chosen < 1e-3).all()
    expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prefill_tokens", [1000, 33])
@pytest.mark.parametrize("prompt", ["short", "long", "picture"])
def test_prefill_and_decode_equal_one_pass(device, prefill_tokens, prompt):
    """Long prompts see more keys than k = 32; chunks of 33 tokens cut vision tokens apart and leave odd rests."""
    model = tiny.model(device)
    prompt = {"short": text_prompt(9), "long": text_prompt(150), "picture": picture_prompt()}[
        prompt
    ]
    engine = Engine(model, 8, prefill_tokens=prefill_tokens)
    ((completion,),) = engine.generate([prompt], SamplingParams(max_new_tokens=12, ignore_eos=True))
    assert len(completion.tokens) == 12 and completion.finish == "length"
    assert_follows(model, prompt, completion)
    assert sorted(engine.cache.free) == list(range(8))


@pytest.mark.parametrize("device", DEVICES)
def test_the_batch_does_not_matter(device):
    """Mixed lengths, prompts that arrive while others decode, shuffled pages, alone or together: the same tokens."""
    model = tiny.model(device)
    prompts = [text_prompt(n, i) for i, n in enumerate([5, 90, 33, 200, 64, 1])] + [
        picture_prompt()
    ]
    params = [SamplingParams(max_new_tokens=4 + 3 * i, temperature=0.8 * (i % 2), seed=i, ignore_eos=True) for i in range(7)]  # fmt: skip
    together = Engine(model, 40, prefill_tokens=48)
    together.cache.free = torch.randperm(40).tolist()
    batched = together.generate(prompts, params)
    for prompt, p, completions in zip(prompts, params, batched):
        ((alone,),) = Engine(model, 8).generate([prompt], p)
        assert alone.tokens == completions[0].tokens
        torch.testing.assert_close(torch.tensor(alone.logprobs), torch.tensor(completions[0].logprobs), rtol=1e-3, atol=1e-3)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_wherever_the_pages_lie(device):
    model = tiny.model(device)
    prompts = [text_prompt(150), picture_prompt(), text_prompt(40)]
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    runs = []
    for pages in (list(range(20)), torch.randperm(20).tolist()):
        engine = Engine(model, 20, prefill_tokens=64)
        engine.cache.free = pages
        runs.append([(c.tokens, c.logprobs) for (c,) in engine.generate(prompts, params)])
    assert runs[0] == runs[1]


def test_inputs_of_a_graph():
    """Every step replaces the last one's requests; rows without one have no page and length 0."""
    buffers = DecodeBuffers(4, 4096, 10, torch.device("cpu"))
    assert (buffers.inputs.page_table == -1).all()
    buffers.fill([5, 6, 7], [130, 20, 64], [Pages("i", row) for row in ([3, 7, 9], [1], [20, 21])], [131, 21, 65])  # fmt: skip
    buffers.fill([8, 9], [40, 2**31], [Pages("i", row) for row in ([2], [4, 5])], [41, 66])
    inputs = buffers.inputs
    assert inputs.input_ids.tolist() == [8, 9, 0, 0] and inputs.lengths.tolist() == [41, 66, 0, 0]
    assert inputs.positions.tolist() == [[40, 2**31, 0, 0]] * 3
    assert inputs.page_table.shape == (4, 64)
    assert inputs.page_table[:, :3].tolist() == [[2, -1, -1], [4, 5, -1], [-1] * 3, [-1] * 3]
    assert (inputs.page_table[:, 3:] == -1).all()


@pytest.mark.parametrize("dense", [False, True])
def test_compiled_steps_are_the_same(dense):
    model = tiny.model()
    ids, positions = [5, 6, 7], [130, 20, 64]
    pages = [Pages("i", row) for row in ([3, 7, 9], [1], [8, 2])]
    results = []
    for compile in (False, True):
        cache = PagedCache(model.config, 10, "cpu", torch.float32)
        random = torch.Generator().manual_seed(0)
        for part in (cache.k, cache.v):
            part.normal_(generator=random)
        graphs = DecodeGraphs(model, cache, dense=dense, compile=compile)
        buffers = DecodeBuffers(4, 4096, model.config.vocab_size, cache.k.device)
        buffers.fill(ids, positions, pages, [n + 1 for n in positions])
        graphs.forward(buffers, 4096)
        results.append((buffers.logits[:3], *cache.parts()))
    for plain, compiled in zip(*results):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("requests", [1, 3])
def test_graphs_decode_like_plain_calls(requests, compile):
    model = tiny.model("cuda")
    prompts = [text_prompt(n, i) for i, n in enumerate([150, 3, 64][:requests])]
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    plain = Engine(model, 20, graphs=False).generate(prompts, params)
    graphs = Engine(model, 20, compile=compile).generate(prompts, params)
    for (a,), (b,) in zip(plain, graphs):
        assert a.tokens == b.tokens
        torch.testing.assert_close(torch.tensor(a.logprobs), torch.tensor(b.logprobs), rtol=1e-3, atol=1e-3)  # fmt: skip


def test_dense_attends_to_every_key():
    model = tiny.model()
    prompt = text_prompt(150)
    sparse, dense = (Engine(model, 8, dense=d).generate([prompt], SamplingParams(max_new_tokens=6, ignore_eos=True))[0][0] for d in (False, True))  # fmt: skip
    ids = torch.cat([prompt.input_ids, torch.tensor(dense.tokens[:-1])])
    cu = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        hidden = model(ids, torch.arange(len(ids)).expand(3, -1), cu, len(ids), dense=True).hidden
    logprobs = model.head(hidden[-6:]).log_softmax(-1).gather(1, torch.tensor(dense.tokens)[:, None])[:, 0]  # fmt: skip
    torch.testing.assert_close(torch.tensor(dense.logprobs), logprobs, rtol=1e-3, atol=1e-3)
    assert sparse.logprobs != dense.logprobs


def test_preempted_requests_resume():
    """Far fewer pages than all requests need at once: they wait or start again, and come out the same."""
    model = tiny.model()
    prompts = [text_prompt(60 + 7 * i, i) for i in range(5)]
    params = SamplingParams(max_new_tokens=60, temperature=0.7, ignore_eos=True)
    roomy = Engine(model, 40).generate(prompts, params)
    engine = Engine(model, 5, prefill_tokens=50)
    preempted = []
    original = engine.preempt
    engine.preempt = lambda sequence: (preempted.append(sequence), original(sequence))
    tight = engine.generate(prompts, params)
    assert preempted
    assert [c[0].tokens for c in tight] == [c[0].tokens for c in roomy]
    assert sorted(engine.cache.free) == list(range(5))


def test_samples_of_a_prompt_share_its_pages():
    model = tiny.model()
    prompt = text_prompt(150)
    engine = Engine(model, 12)
    engine.submit(prompt, SamplingParams(max_new_tokens=30, temperature=1.0, n=4, seed=3, ignore_eos=True))  # fmt: skip
    deltas = engine.step()
    assert [d.sample for d in deltas] == [0, 1, 2, 3]
    assert len(engine.cache.free) == 12 - 2 - 4  # two full pages once, the third four times
    tokens = {i: [d.token for d in deltas if d.sample == i] for i in range(4)}
    for delta in engine.stream():
        tokens[delta.sample].append(delta.token)
    assert len({tuple(t) for t in tokens.values()}) == 4
    for sample in (0, 2):  # a sample's stream depends on the seed and its number alone
        engine = Engine(model, 12)
        params = SamplingParams(max_new_tokens=30, temperature=1.0, n=sample + 1, seed=3, ignore_eos=True)  # fmt: skip
        assert engine.generate([prompt], params)[0][sample].tokens == tokens[sample]


def test_more_samples_than_pages():
    model = tiny.model()
    engine = Engine(model, 4)
    results = engine.generate([text_prompt(70)], SamplingParams(max_new_tokens=70, temperature=1.0, n=3, ignore_eos=True))  # fmt: skip
    assert [len(c.tokens) for c in results[0]] == [70] * 3
    assert sorted(engine.cache.free) == [0, 1, 2, 3]


BAD = {
    "need 3 pages, the cache has 2": (text_prompt(150), SamplingParams(max_new_tokens=20)),
    "exceed the context of 4096": (text_prompt(50), SamplingParams(max_new_tokens=5000)),
    r"input_ids: expected ids in \[0, 300\)": (Prompt(torch.tensor([1, 300])), SamplingParams()),
    r"input_ids: expected shape \[T\]": (Prompt(torch.zeros(0, dtype=torch.int64)), SamplingParams()),
    "pixel_values: 0 patches, grids of 0, 1 placeholders": (Prompt(torch.tensor([1, tiny.IMAGE])), SamplingParams(max_new_tokens=9)),
    "position_ids: expected shape": (Prompt(torch.tensor([1, 2]), torch.zeros(3, 1)), SamplingParams(max_new_tokens=9)),
    "stop: strings need": (text_prompt(5), SamplingParams(max_new_tokens=9, stop=("x",))),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_requests_that_can_never_run_are_refused(message):
    engine = Engine(tiny.model(), 2)
    with pytest.raises(ValueError, match=message):
        engine.submit(*BAD[message])
    assert not engine.waiting


def test_a_failing_request_leaves_the_others_unharmed(monkeypatch):
    model = tiny.model()
    engine = Engine(model, 10)
    encode = model.encode

    def broken(pixels, grids, **kwargs):
        if (pixels == 0).all():
            raise RuntimeError("no memory for this picture")
        return encode(pixels, grids, **kwargs)

    monkeypatch.setattr(model, "encode", broken)
    good, bad = picture_prompt(), picture_prompt()
    bad.pixel_values.zero_()
    params = SamplingParams(max_new_tokens=5, ignore_eos=True)
    first, failed, last = engine.generate([good, bad, text_prompt(20)], params)
    assert failed[0].finish == "error: RuntimeError: no memory for this picture" and failed[0].tokens == []  # fmt: skip
    assert len(first[0].tokens) == len(last[0].tokens) == 5
    assert_follows(model, good, first[0])


def test_end_tokens_end_a_text():
    model = tiny.model()
    prompt = text_prompt(20)
    ((free,),) = Engine(model, 8).generate([prompt], SamplingParams(max_new_tokens=10, ignore_eos=True))  # fmt: skip
    model.config.eos_token_id = [298, free.tokens[4]]
    ((ended,),) = Engine(model, 8).generate([prompt], SamplingParams(max_new_tokens=10))
    first = free.tokens.index(free.tokens[4])
    assert ended.tokens == free.tokens[: first + 1] and ended.finish == "stop"


# ---- sampling --------------------------------------------------------------------------------------


def kept(logits, **params):
    """Tokens that draws from all over [0, 1) reach."""
    draws = [(i + 0.5) / 400 for i in range(400)]
    each = [SamplingParams(**params)] * len(draws)
    return choose(logits.expand(400, -1), each, draws)[0]


def test_filters_keep_what_they_should():
    logits = torch.tensor([[0.1, 0.5, 0.2, 0.15, 0.05]]).log()
    assert set(kept(logits, temperature=1.0).tolist()) == {0, 1, 2, 3, 4}
    assert set(kept(logits, temperature=1.0, top_k=2).tolist()) == {1, 2}
    assert set(kept(logits, temperature=1.0, top_p=0.7).tolist()) == {1, 2}
    assert set(kept(logits, temperature=1.0, top_p=0.71).tolist()) == {1, 2, 3}
    assert set(kept(logits, temperature=1.0, min_p=0.3).tolist()) == {1, 2, 3}
    assert set(kept(logits, temperature=1.0, top_k=3, top_p=0.8).tolist()) == {1, 2}
    assert set(kept(logits, temperature=0.0).tolist()) == {1}


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.1, 0.5, 0.2, 0.15, 0.05]]).log()
    share = torch.bincount(kept(logits, temperature=1.0), minlength=5) / 400
    torch.testing.assert_close(share, logits.exp()[0], rtol=0, atol=0.003)
    share = torch.bincount(kept(logits, temperature=0.5), minlength=5) / 400
    torch.testing.assert_close(share, (2 * logits[0]).softmax(-1), rtol=0, atol=0.003)


def test_logprobs_are_the_models_own():
    logits = torch.randn(3, 50)
    params = [SamplingParams(temperature=t, top_k=5) for t in (0.0, 0.5, 2.0)]
    tokens, logprobs = choose(logits, params, [0.1, 0.5, 0.9])
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[range(3), tokens])


@pytest.mark.parametrize("field, value", [("temperature", -1), ("top_p", 0), ("top_p", 1.1), ("min_p", 2), ("top_k", -1), ("n", 0), ("max_new_tokens", 0), ("stop", ("",))])  # fmt: skip
def test_parameters_out_of_range(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


# ---- pages -----------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 400)), max_size=30))
def test_pages_are_never_lost_or_shared_by_accident(actions):
    cache = PagedCache(tiny.config(num_hidden_layers=1), 12, "cpu", torch.float32)
    owners: list[list[int]] = []
    for action, number in actions:
        before = sorted(cache.free)
        try:
            if action == 0:
                owners.append(cache.allocate(number % 5))
            elif action == 1 and owners:
                cache.release(owners.pop(number % len(owners)))
            elif action == 2 and owners:
                pages = owners[number % len(owners)]
                owners.append(cache.fork(pages, min(number, PAGE_SIZE * len(pages))))
        except OutOfPages:
            assert sorted(cache.free) == before
        counts = [sum(page in pages for pages in owners) for page in range(12)]
        assert counts == cache.owners
        assert sorted(cache.free) == [page for page in range(12) if counts[page] == 0]


def test_fork_copies_the_page_that_will_grow():
    cache = PagedCache(tiny.config(), 6, "cpu", torch.float32)
    pages = cache.allocate(pages_for(100))
    for part in cache.parts():
        part[:, pages] = torch.randint(0, 100, part[:, pages].shape).to(part.dtype)
    forked = cache.fork(pages, 100)
    assert forked[0] == pages[0] and forked[1] != pages[1]
    for part in cache.parts():
        assert torch.equal(part[:, forked], part[:, pages])
    assert list(itertools.compress(range(6), cache.owners)) == sorted({*pages, *forked})
