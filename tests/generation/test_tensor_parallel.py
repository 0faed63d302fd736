"""Two tensor-parallel ranks generate what one process generates."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from support.gates import random_gates
from transformers import LlamaConfig, LlamaForCausalLM

import kvcache

pytest.importorskip("accelerate", reason="transformers needs it for tp_plan")

POLICIES = (
    "full",
    "streamingllm(sinks=2, window=10)",
    "h2o(heavy=6, recent=6)",
    "tokenselect(k=6, sinks=2, local=6)",
    "skipdecode(min_layers=2, max_layers=3, horizon=40)",
    str(kvcache.DuoAttention([[i == j for j in range(4)] for i in range(4)], sinks=2, recent=10)),
    "duoattention(heads=0.5, sinks=2, recent=10)",
    "tova(keep=9)",
    "snapkv(keep=9, window=4, pool=3)",
    "pyramidkv(keep=9, window=4, pool=3, beta=4, generated='evict')",
    "adakv(keep=9, window=4, pool=3)",
    "promptdistill(layer=1, keep=9, truncate=1)",
    "gemfilter(layer=1, keep=9)",
    str(kvcache.TrimKV(random_gates(4, heads=4), 9, slack=0)),
    str(kvcache.TrimKV(random_gates(4, heads=4), 9, slack=2, allocation="global")),
    str(kvcache.TrimKV(random_gates(4, heads=4), 27, slack=1, allocation="global")),  # room is left by the prompt
    "criticalkv(keep=9, window=4, pool=3)",
    "quest(k=16, dense_layers=1)",
    "rkv(keep=9, window=3, lam=0.5, buffer=2, pool=3)",
    str(kvcache.QFilters(torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0)), 9, recent=2)),
)
PROMPT, NEW = 24, 12
WORKER = """
import json, sys
import torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
import kvcache

torch.set_num_threads(1)
dist.init_process_group("gloo")
folder, prompt, new, policies = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
ids = torch.load(folder + "/ids.pt")
found = {}
for policy in policies:
    kvcache.wrap(model, policy)
    out = model.generate(ids, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
    cache = out.past_key_values
    found[policy] = {
        "tokens": out.sequences.tolist(),
        "heads": cache.kept(0).shape[1],
        "kept": [cache.kept(i).tolist() for i in range(4)],
        "selections": sum(r["selections"] for r in cache.report().rows),
    }
kvcache.unwrap(model)
odd = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
odd.config.num_key_value_heads = 1
try:
    kvcache.wrap(odd, "full")
except ValueError as error:
    found["error"] = str(error)
with open(f"{folder}/{dist.get_rank()}.json", "w") as f:
    json.dump(found, f)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(the single process's model and prompt, what each of two ranks found)."""
    folder = tmp_path_factory.mktemp("tensor_parallel")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=98, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    ids = torch.randint(2, 98, (2, PROMPT))
    torch.save(ids, folder / "ids.pt")
    (folder / "worker.py").write_text(textwrap.dedent(WORKER))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        command = [sys.executable, str(folder / "worker.py"), str(folder), str(PROMPT), str(NEW), *POLICIES]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        errors = [p.communicate(timeout=120)[1] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [0, 0], errors
    return model, ids, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("policy", POLICIES, ids=[re.sub("'/.*?'", "...", p) for p in POLICIES])
def test_two_ranks_equal_one_process(runs, policy):
    model, ids, ranks = runs
    kvcache.wrap(model, policy)
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    rows = out.past_key_values.report().rows
    kept = [out.past_key_values.kept(i) for i in range(4)]
    for i in range(4):
        assert torch.cat([torch.tensor(found[policy]["kept"][i]) for found in ranks], 1).tolist() == kept[i].tolist()
    if policy.startswith("adakv") or ("global" in policy and "keep=9" in policy):  # heads of both ranks compete
        assert any(int(k[r, :2].sum()) != int(k[r, 2:].sum()) for k in kept for r in range(2))
    for found in ranks:
        assert found[policy]["tokens"] == out.sequences.tolist()
        assert found[policy]["heads"] == out.past_key_values.kept(0).shape[1] // 2 == 2
        assert found[policy]["selections"] == sum(r["selections"] for r in rows)


def test_heads_that_ranks_cannot_share_are_refused(runs):
    for found in runs[2]:
        assert "num_key_value_heads=1, which 2 tensor-parallel ranks cannot share" in found["error"]
