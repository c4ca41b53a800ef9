"""Measuring what a model can do: task scores, perplexity, forgetting. Nothing here trains."""
