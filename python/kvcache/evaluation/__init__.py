"""Tasks, suites and reports: what ``kvcache demo | eval | bench`` run. Needs no network."""
