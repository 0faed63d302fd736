"""Tasks, suites, reports and the small model: what ``kvcache demo | eval | bench`` run. Needs no network."""

from .loading import load_model, load_tokenizer

__all__ = ["load_model", "load_tokenizer"]
