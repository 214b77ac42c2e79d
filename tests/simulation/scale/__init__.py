"""What a run takes on up to thousands of workers: the real driver, and a world in which everything costs time."""
