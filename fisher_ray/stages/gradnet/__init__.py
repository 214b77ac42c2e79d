"""GradNet as stages of a run: ranges of the entries, the entries themselves, training, validation, prediction."""
