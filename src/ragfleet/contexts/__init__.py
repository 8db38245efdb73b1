"""From queries to contexts: matching, retrieval over versioned corpora, assembly."""
