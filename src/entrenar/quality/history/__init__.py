"""The debt score over time: at commits, tags, ranges, and the revisions that training's checkpoints name."""
