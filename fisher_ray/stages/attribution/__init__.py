"""Which training samples a query is like, which ones the models owe their answer to, and which labels look wrong."""
