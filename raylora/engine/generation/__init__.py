"""Answers from all members at once: what a token is drawn from, and the loop that writes one after another."""
