"""A specification as a roadmap: its tasks and criteria, each criterion with the command that shows whether it holds."""
