"""pytest plugin (``-p support.reduced``): at most ``KVCACHE_VARIANTS`` parametrisations of each test, evenly spread.

Of those with the marker ``KVCACHE_REDUCED`` ("emulated" unless it says "cuda"); all others are left out.

For builds in which everything takes longer; how many examples hypothesis tries is ``KVCACHE_EXAMPLES``.
"""

import os
from collections import defaultdict


def pytest_collection_modifyitems(config, items):
    most, marker = int(os.environ["KVCACHE_VARIANTS"]), os.environ.get("KVCACHE_REDUCED", "emulated")
    tests = defaultdict(list)
    for item in items:
        if item.get_closest_marker(marker):
            tests[item.location[0], getattr(item, "originalname", item.name)].append(item)
    kept = set()
    for variants in tests.values():
        n = min(most, len(variants))
        kept |= {variants[i * len(variants) // n + len(variants) // (2 * n)] for i in range(n)}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
