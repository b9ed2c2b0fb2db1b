"""Models of Hugging Face: families, translation of checkpoints, experts in int8 or on disk, upcycling."""
