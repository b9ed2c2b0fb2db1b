"""Models of Hugging Face: families, translation of checkpoints, int8, experts on disk, upcycling."""
