"""The edge's house: everything that runs on a device that holds private data."""
