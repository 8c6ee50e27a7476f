"""Mutation testing: plant small faults, run the tests that reach them, keep the verdicts, report the scores."""
