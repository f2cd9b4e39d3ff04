"""Evaluating steering by the texts it gives: concepts, instructions, methods, judges, proxies, verdicts."""
