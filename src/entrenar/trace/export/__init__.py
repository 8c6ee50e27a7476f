"""A trace in the forms that other viewers read: one file a form, each a function from a reader to text or bytes."""
