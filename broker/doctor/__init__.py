"""`trtpool doctor`: what of this machine a pool relies on, each line ok or with what to do.

::

    cli --> kernel, memory, limits, container, places   look at a `Host`: files below a root, and system calls
        '-> packages, gpus                              read what a child found (`trtpool.workers.probe`), and the Host
        '-> leftovers                                   of pools that were killed; removed with --fix

A check looks and says; only `leftovers.remove` changes anything.  Each yields `Finding`s, and one that cannot be made
is a finding too.
"""
