"""``generate_batch``: every request gets the tokens that it would get alone, whoever runs beside it."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import build, continued, prompt
from transformers import BloomForCausalLM, ContinuousBatchingConfig, FalconH1ForCausalLM, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestStatus

import kvcache
from kvcache import batching
from kvcache.evaluation.tiny_models import tiny_model
from kvcache.store import PageStorage

SKIP = kvcache.SkipDecode(min_layers=1, max_layers=2, horizon=60)
POLICIES = {
    "full": kvcache.Full(),
    "streamingllm": kvcache.StreamingLLM(sinks=2, window=9),
    "h2o": kvcache.H2O(5, 4),
    "h2o, shares": kvcache.H2O(0.2, 0.1),
    "tokenselect": kvcache.TokenSelect(k=8, sinks=2, local=6, reuse=0.4, chunk=5),
    "skipdecode": SKIP,
    "random": kvcache.RandomEviction(9, sinks=1, recent=2, seed=3),
    "h2o|skipdecode": kvcache.H2O(5, 4) | SKIP,
    "keydiff": kvcache.KeyDiff(8, recent=2, slack=3),
    "lagkv": kvcache.LagKV(0.5, sinks=1, lag=4),
    "quest": kvcache.Quest(12, 1),
    "rkv": kvcache.RKV(8, window=3, lam=0.4, buffer=3, pool=3),
    "criticalkv": kvcache.CriticalKV(9, 4, 3),
    "expectedattention": kvcache.ExpectedAttention(8, horizon=20, sinks=1, slack=2),
    "duoattention": kvcache.DuoAttention(((True, False), (False, False)), sinks=2, recent=6),
    "tova": kvcache.TOVA(9),
    "snapkv": kvcache.SnapKV(9, 4, 3),
    "snapkv|skipdecode": kvcache.SnapKV(0.3, 4, 3) | SKIP,
    "adakv": kvcache.AdaKV(9, 4, 3, generated="evict"),
    "promptdistill": kvcache.PromptDistill(0, 0.3, truncate=1),
    "gemfilter": kvcache.GemFilter(1, 0.3),
    "emasink": kvcache.EMASink(sinks=2, window=7, alpha=0.7),
    "d2o": kvcache.D2O(5, 4),
    "h2o|cache": kvcache.H2O(5, 4) | kvcache.CachePositions(),
}
LENGTHS = (30, 7, 19, 44, 1, 23, 30)
PROMPTS = [prompt(n, seed=40 + i)[0].tolist() for i, n in enumerate(LENGTHS)]


def plain(**options):
    return build(num_hidden_layers=2, **options)


def config(**options):
    return ContinuousBatchingConfig(**options)


def alone(model, ids, new=10):
    return continued(model, torch.tensor([ids]), new=new)[0].tolist()


@pytest.mark.parametrize(("rows", "chunk"), [(64, 2048), (3, 25), (2, 10)])
@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_those_of_each_request_alone(name, rows, chunk):
    model = kvcache.wrap(plain(), POLICIES[name], page_size=4)
    wanted = [alone(model, x) for x in PROMPTS]
    options = config(max_requests_per_batch=rows, max_batch_tokens=chunk)
    outputs = model.generate_batch(PROMPTS, continuous_batching_config=options, max_new_tokens=10, do_sample=False)
    assert list(outputs) == [f"req_{i}" for i in range(len(PROMPTS))]
    assert [x.generated_tokens for x in outputs.values()] == wanted
    assert [x.prompt_ids for x in outputs.values()] == PROMPTS
    assert all(x.status == RequestStatus.FINISHED and x.error is None for x in outputs.values())


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gpt-oss", "deepseek-v3", "gpt2", "gemma3", "opt"])
def test_architectures(kind):
    model = build(kind)
    wanted = [alone(model, x) for x in PROMPTS]  # not wrapped
    options = config(max_requests_per_batch=3, max_batch_tokens=32)
    outputs = kvcache.wrap(model, page_size=4).generate_batch(
        PROMPTS, continuous_batching_config=options, max_new_tokens=10, do_sample=False
    )
    assert [x.generated_tokens for x in outputs.values()] == wanted


def test_a_model_that_computes_attention_itself():
    model = tiny_model(BloomForCausalLM, "bloom")
    prompts = [[x % model.config.vocab_size for x in ids] for ids in PROMPTS]
    wanted = [alone(model, x) for x in prompts]
    outputs = kvcache.wrap(model, page_size=4).generate_batch(prompts, max_new_tokens=10, do_sample=False)
    assert [x.generated_tokens for x in outputs.values()] == wanted


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    rows=st.integers(1, 5),
    chunk=st.integers(1, 60),
    name=st.sampled_from(["full", "streamingllm", "h2o", "skipdecode", "keydiff", "duoattention"]),
    eos=st.lists(st.integers(0, 95), max_size=12),
    room=st.integers(60, 200),
)
def test_any_queue(lengths, rows, chunk, name, eos, room):
    """Requests end at different times (eos), the pool is small, and still: the tokens of each alone."""
    model = kvcache.wrap(plain(), POLICIES[name], page_size=4)
    prompts = [prompt(n, seed=7 * i + n)[0].tolist() for i, n in enumerate(lengths)]
    ends = eos or None
    wanted = []
    for ids in prompts:
        tokens = model.generate(
            torch.tensor([ids]), max_new_tokens=9, do_sample=False, eos_token_id=ends, pad_token_id=0
        )
        wanted.append(tokens[0, len(ids) :].tolist())
    kvcache.wrap(model, POLICIES[name], page_size=4, max_tokens=room)
    options = config(max_requests_per_batch=rows, max_batch_tokens=chunk)
    outputs = model.generate_batch(
        prompts,
        GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=ends, pad_token_id=0),
        continuous_batching_config=options,
    )
    assert [x.error for x in outputs.values()] == [None] * len(prompts)
    assert [x.generated_tokens for x in outputs.values()] == wanted


def test_the_pool_stays_within_max_tokens_and_is_given_back(monkeypatch):
    model = kvcache.wrap(plain(), page_size=4, max_tokens=100)
    most, together = 0, 0
    step = batching.Scheduler.step

    def watched(self):
        nonlocal most, together
        step(self)
        for storage in self.storages.values():
            assert storage.pool.used <= storage.limit
            most = max(most, storage.pool.used)
        together = max(together, 0 if self.running is None else len(self.running.requests))

    monkeypatch.setattr(batching.Scheduler, "step", watched)
    outputs = model.generate_batch(PROMPTS * 2, max_new_tokens=12, do_sample=False)
    assert all(x.status == RequestStatus.FINISHED for x in outputs.values())
    assert together > 1
    heads = 2 * model.config.num_key_value_heads
    assert 4 * most > 60 * heads  # the room was used
    del outputs
    gc.collect()
    assert not [x for x in gc.get_objects() if isinstance(x, PageStorage) and x.pool.used]


def test_an_evicting_policy_runs_more_requests_in_the_same_room(monkeypatch):
    prompts = [prompt(40, seed=i)[0].tolist() for i in range(8)]

    def most_together(policy):
        model = kvcache.wrap(plain(), policy, page_size=4, max_tokens=130)
        together = 0
        step = batching.Scheduler.step

        def watched(self):
            nonlocal together
            step(self)
            together = max(together, 0 if self.running is None else len(self.running.requests))

        with monkeypatch.context() as patch:
            patch.setattr(batching.Scheduler, "step", watched)
            outputs = model.generate_batch(prompts, max_new_tokens=20, do_sample=False)
        assert [(x.error, len(x.generated_tokens)) for x in outputs.values()] == [(None, 20)] * 8
        return together

    assert most_together("full") == 2  # 2 x 60 of 130
    assert most_together(kvcache.StreamingLLM(sinks=2, window=9)) >= 5


def test_what_is_too_long_is_refused_before_anything_runs():
    model = kvcache.wrap(plain(), page_size=4, max_tokens=40)
    with pytest.raises(ValueError, match=r"inputs\[1\] comes to 49 tokens \(30 now\), more than max_tokens=40"):
        model.generate_batch([PROMPTS[1], PROMPTS[0]], max_new_tokens=20, do_sample=False)


def test_one_request_without_room_fails_alone():
    """A budget beyond what the pool holds: found out when the prompt is there; the others go on."""
    model = kvcache.wrap(plain(), kvcache.H2O(60, 30), page_size=4, max_tokens=44)
    outputs = model.generate_batch([PROMPTS[0], PROMPTS[1]], max_new_tokens=30, do_sample=False)
    failed, fine = outputs.values()
    assert failed.status == RequestStatus.FAILED
    assert "max_tokens" in failed.error
    assert fine.generated_tokens == alone(kvcache.wrap(plain(), kvcache.H2O(60, 30), page_size=4), PROMPTS[1], 30)


def test_samples_share_their_prompt_and_a_seed_repeats_them():
    model = kvcache.wrap(plain(), page_size=4)
    asked = GenerationConfig(max_new_tokens=8, do_sample=True, num_return_sequences=3, top_k=20, temperature=1.5)
    first, again, other = (
        model.generate_batch(
            PROMPTS[:2],
            asked,
            continuous_batching_config=config(seed=seed, return_logprobs=True),
            record_timestamps=True,
        )
        for seed in (5, 5, 6)
    )
    assert list(first) == ["req_0__child#0", "req_0__child#1", "req_0", "req_1__child#0", "req_1__child#1", "req_1"]
    tokens = [[x.generated_tokens for x in run.values()] for run in (first, again, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len({tuple(x) for x in tokens[0]}) > 3
    for output in first.values():
        assert len(output.logprobs) == len(output.timestamps) == 8
        assert all(x <= 0 for x in output.logprobs)
        assert output.timestamps == sorted(output.timestamps)
        assert output.lifespan[0] <= output.timestamps[0] <= output.timestamps[-1] <= output.lifespan[1]


def test_logits_processors_see_the_tokens_of_their_row():
    model = kvcache.wrap(plain(), kvcache.H2O(5, 4), page_size=4)
    options = {"max_new_tokens": 10, "do_sample": False, "repetition_penalty": 1.9, "no_repeat_ngram_size": 2}
    wanted = [model.generate(torch.tensor([x]), **options)[0, len(x) :].tolist() for x in PROMPTS]
    assert [x.generated_tokens for x in model.generate_batch(PROMPTS, **options).values()] == wanted


def test_log_probabilities_are_those_of_the_model():
    model = plain()
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        wanted = model(ids).logits[0, -1].log_softmax(-1).max().item()
    kvcache.wrap(model)
    outputs = model.generate_batch(
        PROMPTS[:1], max_new_tokens=2, do_sample=False, continuous_batching_config=config(return_logprobs=True)
    )
    assert outputs["req_0"].logprobs[0] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ("text", {}, "inputs must be a list of lists of token ids, got str"),
        ([[1, "a"]], {}, r"inputs\[0\] must be a list of token ids"),
        ([[1], []], {}, r"inputs\[1\] is empty"),
        ([[1], [3, -2]], {}, r"inputs\[1\] has token -2, outside 0\.\."),
        ([[10**6]], {}, r"inputs\[0\] has token 1000000"),
        ([[1]], {"num_beams": 2}, "greedily or by sampling, but the config asks for beam"),
        ([[1]], {"stop_strings": ["a"]}, "stop_strings is not supported"),
        ([[1]], {"max_new_tokenz": 3}, "does not know.*max_new_tokenz"),
        ([[1, 2, 3]], {"max_length": 3}, r"nothing is left of max_length=3"),
    ],
)
def test_bad_requests_are_refused_by_name(inputs, options, message):
    model = kvcache.wrap(plain())
    with pytest.raises((TypeError, ValueError), match=message):
        model.generate_batch(inputs, **options)


def test_recurrent_states_are_refused():
    model = kvcache.wrap(tiny_model(FalconH1ForCausalLM, "falcon_h1"))
    with pytest.raises(ValueError, match="generate_batch needs layers that keep nothing but keys and values"):
        model.generate_batch([[1, 2]], max_new_tokens=2)


def test_nothing_asked_and_unwrapped():
    model = kvcache.wrap(plain())
    assert model.generate_batch([]) == {}
    kvcache.unwrap(model)
    assert "generate_batch" not in model.__dict__
