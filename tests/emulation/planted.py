"""Runs self-test kernels of csrc/emulation/selftest, in a process that a bug may end.

    planted.py LIBRARY 0|1|primitives [CASE...]

0: the right kernels, 1: those with the bug; without a case, all of them.
"""

import ctypes
import os
import sys

library = ctypes.CDLL(sys.argv[1])
for function in (library.kvcache_emulated_planted, library.kvcache_emulated_planted_names):
    function.restype = ctypes.c_char_p
if os.environ["KVCACHE_EMULATION"] == "shuffled":
    library.kvcache_emulated_shuffle(1, ctypes.c_uint64(1))
primitives = sys.argv[2] == "primitives"
bug = 0 if primitives else int(sys.argv[2])
cases = sys.argv[3:] or library.kvcache_emulated_planted_names(int(primitives)).decode().split()
for case in cases:
    message = library.kvcache_emulated_planted(case.encode(), bug)
    print(f"{case}: {message.decode() if message else 'passed'}", flush=True)
