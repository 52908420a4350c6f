"""Runs as jobs of a Ray cluster: what is sent, under which name, and what becomes of it."""
