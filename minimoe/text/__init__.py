"""Text by domain: fetched, split by whole works, tokenised."""
