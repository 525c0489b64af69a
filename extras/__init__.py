"""Side stories, each run as `python -m extras.NAME`."""
