"""Gates on any Python tree: its debt, what its tests notice (mutants), what they reach (coverage), by risk."""
