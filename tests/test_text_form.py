"""The text form of policies: every policy and composition survives ``parse_policy(str(policy))``; typos are named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.gates import random_gates

import kvcache
from kvcache import (
    H2O,
    DuoAttention,
    ExpectedAttention,
    Full,
    KeyDiff,
    KNorm,
    LagKV,
    RandomEviction,
    SkipDecode,
    StreamingLLM,
    TokenSelect,
    parse_policy,
)

counts = st.integers(1, 10**6)
windows = {
    "keep": st.integers(100, 10**6) | st.floats(0, 1, exclude_min=True),
    "window": st.integers(1, 99),
    "pool": st.sampled_from([1, 5, 7]),
    "pooling": st.sampled_from(["avg", "max"]),
    "generated": st.sampled_from(["keep", "evict"]),
}
shares = st.floats(0, 1, exclude_min=True)
sizes = st.builds(lambda n, unit: f"{n}{unit}", st.integers(1, 4096), st.sampled_from(["B", "KB", "KiB", "MiB", "GB"]))
budgets = counts | shares | sizes

retention = st.one_of(
    st.builds(StreamingLLM, sinks=st.integers(0, 99), window=budgets),
    st.builds(H2O, heavy=budgets, recent=budgets | st.just(0), group=st.sampled_from(["mean", "max"])),
    st.builds(kvcache.TOVA, keep=budgets, sinks=st.integers(0, 9), recent=budgets),
    st.builds(kvcache.SnapKV, **windows),
    st.builds(kvcache.PyramidKV, **windows, beta=counts),
    st.builds(kvcache.CriticalKV, **windows, share=st.floats(0, 1)),
    st.builds(kvcache.AdaKV, **windows, floor=st.floats(0, 1)),
    st.builds(RandomEviction, keep=budgets, sinks=st.integers(0, 9), recent=budgets, seed=st.integers(0, 2**31)),
    st.builds(KNorm, keep=budgets, sinks=st.integers(0, 9), recent=budgets | st.just(0)),
    st.builds(
        kvcache.QFilters,
        filters=st.just([[[0.25, -1.5]]]) | st.just([[[3.0], [1e-9]], [[0.1], [-0.0]]]),
        keep=budgets,
        sinks=st.integers(0, 9),
        recent=budgets | st.just(0),
    ),
    st.builds(
        kvcache.RKV,
        keep=st.integers(100, 10**6) | shares | sizes,
        window=st.integers(1, 99),
        lam=st.floats(0, 1),
        buffer=counts,
        pool=st.sampled_from([1, 5, 7]),
        threshold=st.floats(-1, 1),
    ),
    st.builds(KeyDiff, keep=budgets, sinks=st.integers(0, 9), recent=budgets, slack=st.integers(0, 500)),
    st.builds(LagKV, keep=st.integers(60, 10**6) | shares | sizes, sinks=st.integers(0, 9), lag=st.integers(2, 20)),
    st.builds(
        ExpectedAttention,
        keep=budgets,
        horizon=counts,
        sinks=st.integers(0, 9),
        recent=budgets | st.just(0),
        slack=st.integers(0, 500),
    ),
    st.builds(
        kvcache.TrimKV,
        gates=st.sampled_from([None, random_gates(2), random_gates(3, heads=4)]),
        keep=budgets,
        slack=st.integers(0, 500),
        sinks=st.integers(0, 9),
        recent=budgets | st.just(0),
        allocation=st.sampled_from(["head", "global"]),
        floor=st.floats(0, 1),
    ),
    st.builds(
        DuoAttention,
        heads=shares | st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=4),
        sinks=st.integers(0, 9),
        recent=budgets,
        seed=st.integers(0, 2**31),
    ),
)
attended = {"heavy": budgets, "recent": budgets | st.just(0), "group": st.sampled_from(["mean", "max"])}
positive = st.floats(0, 1, exclude_min=True)
retention |= st.one_of(
    st.builds(
        kvcache.EMASink,
        sinks=st.integers(4, 99),
        window=budgets,
        alpha=st.floats(0, 1) | st.integers(0, 1),
        pinned=st.integers(0, 3),
        counted=st.booleans(),
    ),
    st.builds(kvcache.CaM, **attended, spread=counts, seed=st.integers(0, 2**31)),
    st.builds(kvcache.D2O, **attended, smoothing=positive),
    st.builds(kvcache.KVMerger, **attended, bandwidth=positive),
)
selection = st.builds(kvcache.Quest, k=counts, dense_layers=st.integers(0, 99)) | st.builds(
    TokenSelect,
    k=counts,
    sinks=st.integers(0, 99),
    local=counts,
    reuse=st.floats(-1, 2) | st.integers(-1, 2),
    positions=st.sampled_from(["original", "compact"]),
    chunk=counts,
    vote=st.sampled_from(["soft", "raw"]),
)


@st.composite
def skipdecode(draw):
    low = draw(st.integers(1, 40))
    high = draw(st.integers(low, 80))
    return SkipDecode(
        low,
        high,
        horizon=draw(counts),
        warmup=draw(st.integers(0, low)),
        prompt=draw(st.sampled_from(["full", "n_max", "schedule"])),
    )


@st.composite
def policies(draw):
    parts = [draw(st.one_of(retention, selection, st.just(Full())))]
    if draw(st.booleans()):
        parts.insert(draw(st.integers(0, 1)), draw(skipdecode()))
    if not any(p.selects for p in parts) and draw(st.booleans()):
        parts.append(kvcache.CachePositions())
    out = parts[0]
    for part in parts[1:]:
        out = out | part
    return out


@given(policies())
def test_round_trip(policy):
    text = str(policy)
    again = parse_policy(text)
    assert again == policy
    assert hash(again) == hash(policy)
    assert str(again) == text
    assert type(again) is type(policy)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", Full()),
        (" Full( ) ", Full()),
        ("h2o", H2O()),
        ("H2O(recent=3)", H2O(0.1, 3)),
        ("h2o(heavy='512MiB', recent=0)", H2O("512MiB", 0)),
        ("streamingllm(sinks=4, window=1020)", StreamingLLM()),
        ("tokenselect(k=2048, sinks=128, local=512, reuse=0.9)", TokenSelect()),
        ("tokenselect(reuse=-1)", TokenSelect(reuse=-1)),
        ("skipdecode(min_layers=11, max_layers=22, horizon=1024, warmup=1)", SkipDecode()),
        ("h2o|skipdecode", H2O() | SkipDecode()),
        ("full | h2o | full", H2O()),
    ],
)
def test_known_texts(text, policy):
    assert parse_policy(text) == policy


def test_defaults_are_the_papers():
    assert str(H2O()) == "h2o(heavy=0.1, recent=0.1)"
    assert str(StreamingLLM()) == "streamingllm(sinks=4, window=1020)"
    assert str(TokenSelect()) == "tokenselect(k=2048, sinks=128, local=512, reuse=0.9)"
    assert TokenSelect().chunk == 512
    assert str(kvcache.SnapKV()) == "snapkv(keep=2048, window=32, pool=5)"
    assert str(kvcache.PyramidKV()) == "pyramidkv(keep=2048, window=32, pool=5, beta=20)"
    assert str(kvcache.AdaKV()) == "adakv(keep=2048, window=32, pool=5, floor=0.2)"
    assert str(kvcache.TOVA()) == "tova(keep=512, sinks=0, recent=0)"
    assert str(SkipDecode()) == "skipdecode(min_layers=11, max_layers=22, horizon=1024, warmup=1)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h20(heavy=4)", "unknown policy 'h20'.*did you mean 'h2o'"),
        ("streamllm", "unknown policy 'streamllm'.*'streamingllm'"),
        ("nonsense", "unknown policy 'nonsense'.*known: .*full, .*h2o"),
        ("h2o(heavi=4)", "h2o has no argument 'heavi'.*did you mean 'heavy'"),
        ("h2o(4)", "arguments of h2o must be given by name"),
        ("h2o(**{'heavy': 4})", "h2o has no argument"),
        ("h2o(heavy=four)", "heavy must be a number or text"),
        ("h2o(heavy=__import__('os'))", "heavy must be a number or text"),
        ("h2o(heavy=2+2)", "heavy must be a number or text"),
        ("h2o(heavy=4", "cannot be read"),
        ("", "cannot be read"),
        ("h2o & full", "cannot be read"),
        ("kvcache.H2O()", "cannot be read"),
        ("h2o | ", "cannot be read"),
        ("h2o | streamingllm", "cannot combine.*retention"),
        ("tokenselect | tokenselect", "cannot combine.*selection"),
        ("h2o | tokenselect", "cannot combine.*evicts"),
        ("skipdecode | skipdecode", "cannot combine.*layer schedule"),
    ],
)
def test_bad_texts_name_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


def test_a_policy_is_text_or_a_policy():
    with pytest.raises(TypeError, match="policy must be text, got 3"):
        parse_policy(3)
    with pytest.raises(TypeError, match="combined with"):
        H2O() | "full"
    assert kvcache.parse_policy is parse_policy
