"""`trtpool reload`: other engines of the same signature for a pool that serves.

::

    requests   what a command asks of the supervisor over RUN_DIR/requests, and the asking; `desk` is the other end
    reloads    what becomes of a request: examined --> loaded by workers that stand by --> switched --> old ones end
    examine    a child that looks at the new files, and builds those that must be
    command    the command line
"""
