"""Remote APIs: what is asked of them, what they reply, how fast and for how much."""
