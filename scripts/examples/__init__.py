"""Short programs with trained models, each to be read in a minute; README names them.

They are run as files, and share one shape: what a row is, what is written into a slot, what is made of an answer, and
`main`.  `shell` is what is the same in all.
"""
