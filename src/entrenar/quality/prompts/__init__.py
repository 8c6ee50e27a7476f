"""Prompts for work on a code base: texts with variables, filled with facts that were measured of the repository."""
