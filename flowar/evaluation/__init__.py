"""Measure images: readers, feature networks and the files that keep features, metrics, references, the report."""
