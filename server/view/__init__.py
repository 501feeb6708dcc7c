"""The operator's view: a gRPC service that shows a run from its directory alone, and the commands that ask it.

It reads, and takes no lock: it works whether the server is training, dead, or done. operator.proto is the protocol.
"""
