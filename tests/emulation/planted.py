"""Runs self-test kernels of csrc/emulation/selftest, in a process that a bug may end: LIBRARY BUG [CASE...]"""

import ctypes
import os
import sys

library = ctypes.CDLL(sys.argv[1])
for function in (library.kvcache_emulated_planted, library.kvcache_emulated_planted_names):
    function.restype = ctypes.c_char_p
if os.environ["KVCACHE_EMULATION"] == "shuffled":
    library.kvcache_emulated_shuffle(1, ctypes.c_uint64(1))
bug, cases = int(sys.argv[2]), sys.argv[3:] or library.kvcache_emulated_planted_names().decode().split()
for case in cases:
    message = library.kvcache_emulated_planted(case.encode(), bug)
    print(f"{case}: {message.decode() if message else 'passed'}", flush=True)
