"""The machinery that the scripts share."""
