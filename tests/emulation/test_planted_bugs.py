"""Each bug in csrc/emulation/selftest must be caught, and the same kernels without it must pass in every build."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from support import emulation

pytestmark = pytest.mark.emulated

# bug -> what the builds say of it. Where a build is missing, it need not notice; where "wrong result" stands, the test
# of a kernel would. The race build must name every bug and its line.
CAUGHT = {
    "divergent_barrier": {
        "plain": r"divergent barrier: __syncthreads at planted_sync.cu:\d+, while other threads wait",
        "race": r"divergent barrier: __syncthreads at planted_sync.cu:\d+",
    },
    "some_lanes_at_a_barrier_others_at_a_shuffle": {
        "plain": r"deadlock: 16 thread\(s\) wait in __syncthreads at \S+; 16 thread\(s\) wait in __shfl_sync",
        "race": r"deadlock: .*planted_sync.cu:\d+",
    },
    "lane_exits_before_a_shuffle": {
        "plain": r"lane 31 exits while other lanes of its warp wait for it in __shfl_xor_sync at planted_sync.cu:\d+",
        "shuffled": r"lane 31 exits|lane 31 of the mask has exited",
        "race": r"lane 31 exits .* planted_sync.cu:\d+",
    },
    "lanes_shuffle_at_two_lines": {
        "plain": r"divergent warp collective: __shfl_xor_sync at \S+:\d+, while other lanes wait in __shfl_xor_sync at",
        "race": r"divergent warp collective: __shfl_xor_sync at planted_sync.cu:\d+",
    },
    "shuffle_from_a_lane_outside_of_the_mask": {
        "plain": r"__shfl_xor_sync at planted_sync.cu:\d+ reads lane 31, which is outside the mask",
        "race": r"planted_sync.cu:\d+ reads lane 31, which is outside the mask",
    },
    "lanes_meet_under_different_masks": {
        "plain": r"lanes of one warp meet under different masks: __any_sync at planted_sync.cu:\d+",
        "race": r"lanes of one warp meet under different masks: __any_sync at planted_sync.cu:\d+",
    },
    "no_barrier_between_write_and_read": {
        "plain": "wrong result",
        "shuffled": "wrong result",
        "asan": "wrong result",
        "race": r"read of uninitialised dynamic shared memory at planted_sync.cu:\d+",
    },
    "no_barrier_before_shared_memory_is_reused": {
        "plain": "wrong result",
        "shuffled": "wrong result",
        "race": r"race in dynamic shared memory: read at \S+:\d+, not in order with the write by thread 63 at",
    },
    "no_syncwarp": {
        "race": r"race in dynamic shared memory: read at planted_sync.cu:\d+, not in order with the write by thread 0",
    },
    "syncwarp_of_a_mask_without_the_writer": {
        "race": r"(race in|read of uninitialised) dynamic shared memory.* at planted_sync.cu:\d+",
    },
    "plain_read_of_an_atomic_counter": {
        "plain": "wrong result",
        "race": r"race in dynamic shared memory: atomic operation at \S+:\d+, not in order with the read by thread 63",
    },
    "two_blocks_write_the_same_place": {
        "race": r"race in global memory: write at planted_sync.cu:\d+, not in order with the write by thread 31 of the"
        r" launch's block number 0 at planted_sync.cu:\d+",
    },
    "last_block_reads_without_a_fence": {
        "race": r"race in global memory: read at planted_sync.cu:\d+, not in order with the write by thread 0 of the"
        r" launch's block number 0",
    },
    "no_barrier_between_threads_of_a_block_in_global_memory": {
        "shuffled": "wrong result",
        "race": r"race in global memory: read at planted_sync.cu:\d+, not in order with the write by thread 0",
    },
    "dynamic_shared_memory_overrun": {
        "plain": r"something wrote to offset 128 of 128",
        "asan": r"use-after-poison .*planted_memory.cu:\d+",
        "race": r"access beyond dynamic shared memory at planted_memory.cu:\d+: 4 bytes at offset 128 of 128",
    },
    "dynamic_shared_memory_overrun_by_a_read": {
        "asan": r"use-after-poison .*planted_memory.cu:\d+",
        "race": r"access beyond dynamic shared memory at planted_memory.cu:\d+: 4 bytes at offset 128 of 128",
    },
    "static_shared_memory_overrun": {
        "race": r"index 31 is outside of the array 'float \[31\]' at planted_memory.cu:\d+",
    },
    "read_of_uninitialised_shared_memory": {
        "race": r"read of uninitialised dynamic shared memory at planted_memory.cu:\d+",
    },
    "page_table_entry_of_minus_one": {
        "asan": r"heap-buffer-overflow .*planted_memory.cu:\d+",
        "race": r"read of 4 bytes outside of every buffer of the call, 64 bytes before the start of one, at planted",
    },
    "page_table_read_past_its_end": {
        "asan": r"heap-buffer-overflow .*planted_memory.cu:\d+",
        "race": r"read of 4 bytes outside of every buffer of the call, 0 bytes behind the end of one, at planted",
    },
    "page_of_somebody_else": {"race": r"read of a page that does not belong to this call, at planted_memory.cu:\d+"},
    "write_to_a_read_only_buffer": {"race": r"write to a read-only buffer at planted_memory.cu:\d+"},
    "write_past_the_end_of_a_tensor": {
        "asan": r"heap-buffer-overflow .*planted_memory.cu:\d+",
        "race": r"write of 4 bytes outside of every buffer of the call, 0 bytes behind the end of one, at planted",
    },
    "misaligned_vector": {
        "race": r"misaligned access to 'const struct float4', whose address must be a multiple of 16 at planted_memory",
    },
    "misaligned_streaming_load": {
        "plain": r"misaligned: load_streaming at planted_memory.cu:\d+ needs an address that is a multiple of 16",
        "race": r"misaligned: load_streaming at planted_memory.cu:\d+",
    },
    "offset_beyond_32_bits": {
        "plain": "wrong result",
        "race": r"integer overflow in \* at planted_memory.cu:\d+",
    },
    "too_many_threads": {"plain": "CUDA error 9", "race": "CUDA error 9"},
    "too_much_shared_memory": {"plain": "CUDA error 1", "race": "CUDA error 1"},
    "grid_too_high": {"plain": "CUDA error 9", "race": "CUDA error 9"},
    "grid_of_nothing": {"plain": "CUDA error 9", "race": "CUDA error 9"},
    "wait_for_too_few_copies": {
        "plain": "wrong result",
        "race": r"which an asynchronous copy issued by thread 1 at \S+ still fills: it was not waited",
    },
    "no_wait_for_copies": {
        "plain": "wrong result",
        "race": r"read of dynamic shared memory at planted_copies.cu:\d+, which an asynchronous copy .* still fills",
    },
    "no_barrier_behind_the_wait": {
        "plain": "wrong result",
        "race": r"(race in|read of uninitialised) dynamic shared memory.* at planted_copies.cu:\d+",
    },
    "no_barrier_before_the_refill": {
        "shuffled": "wrong result",
        "race": r"race in dynamic shared memory: write at planted_copies.cu:\d+, not in order with the read by",
    },
    "misaligned_copy": {
        "plain": r"misaligned: cp_async's shared address at planted_copies.cu:\d+ needs .* multiple of 16",
        "race": r"misaligned: cp_async's shared address at planted_copies.cu:\d+",
    },
    "copy_to_local_memory": {
        "plain": r"cp_async at planted_copies.cu:\d+: the target does not lie in shared memory",
        "race": r"cp_async at planted_copies.cu:\d+: the target does not lie in shared memory",
    },
}


def run(build: str, bug: bool, *cases: str) -> str:
    """What the self-test says, and where the process ended what it said last."""
    script = str(Path(__file__).with_name("planted.py"))
    done = subprocess.run(
        [sys.executable, script, str(emulation.path(build)), str(int(bug)), *cases],
        env={**os.environ, **emulation.environment(build)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + (" ".join(done.stderr.split()) if done.returncode else "")


@cache
def without_bugs(build: str) -> list[str]:
    return run(build, False).splitlines()


@pytest.mark.parametrize("build", map(emulation.with_build, emulation.BUILDS))
def test_the_right_kernels_pass(build):
    assert without_bugs(build) == [f"{line.split(':')[0]}: passed" for line in without_bugs(build)]
    assert {line.split(":")[0] for line in without_bugs(build)} == set(CAUGHT)


@pytest.mark.parametrize(("case", "build"), [emulation.with_build(b, case) for case in CAUGHT for b in CAUGHT[case]])
def test_the_bug_is_caught(case, build):
    assert re.search(
        f"{case}: .*{CAUGHT[case][build]}" if build != "asan" else CAUGHT[case][build], run(build, True, case)
    )


def test_every_bug_is_caught_by_the_race_build():
    assert all("race" in builds for builds in CAUGHT.values())
