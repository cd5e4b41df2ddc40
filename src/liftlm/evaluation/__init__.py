"""Evaluation against published benchmarks: predict → predictions.jsonl → score → report. Each step can be redone alone."""
