"""Versioned API corpora: from archives of a package index, or from users' own files, to JSONL."""
