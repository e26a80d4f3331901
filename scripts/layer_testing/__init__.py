"""Parts of layertest.py: one rank's experts from a checkpoint, and the reports for people and machines."""
