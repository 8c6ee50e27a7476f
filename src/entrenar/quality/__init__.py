"""Gates on any Python tree: what its tests notice (mutants), what they reach (coverage), by risk."""
