"""``kvcache bench`` and what the scripts in bench/end_to_end share: shapes, caches behind a context, clocks, limits."""
