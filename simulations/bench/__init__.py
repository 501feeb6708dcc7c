"""`fedlr bench`: ours and the named rivals, in turn, on the same work, after a check that they compute the same.

One file a benchmark (step, cohort, round, memory, overhead, parity, gpu, profile), one line each in `registry`.
To add one: write `NAME.py` with `run(settings) -> Outcome`, add its line there and its goals to `goals`.
"""
