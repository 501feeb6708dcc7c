"""The operator's house: everything that runs on the machine of the server."""
