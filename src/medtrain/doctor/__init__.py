"""Judgements about a recipe before it costs anything."""
