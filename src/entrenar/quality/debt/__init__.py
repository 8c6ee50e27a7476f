"""The technical-debt score: 0 to 100 for a function, a file and a tree of Python, and the findings that cost points."""
