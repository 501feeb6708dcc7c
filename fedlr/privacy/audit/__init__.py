"""What an auditor computes from what a mechanism released: estimates with exact p-values, and lower bounds on epsilon.

Nothing here runs a mechanism: numbers go in, numbers come out. `fedlr.simulations.audit` drives a federation and feeds
them.
"""
