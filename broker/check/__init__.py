"""`trtpool check`: what a change of precision costs.

Two models get the same items (`feeds`), each in an embedded pool of its own, and what they answer is compared output by
output (`compare`); `command` has the options and the verdict.
"""
