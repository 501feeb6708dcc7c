"""`fedlr audit`: a federation as configured, measured from outside: is what it releases as private as is accounted?"""
