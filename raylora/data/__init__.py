"""Rows of text, from their sources to padded batches, and what a task makes of a model's logits."""
