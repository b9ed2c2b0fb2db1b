"""Text by domain, tokens, batches and the training loop."""
