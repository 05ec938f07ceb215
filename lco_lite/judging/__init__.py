"""Scores for free text: a judge that compares two answers, and reward models that read one."""
