"""`trtpool profile`: measured in a child, judged and shown here.

::

    command -> asking -> (child: trtpool.workers.profile) -> Measured -> advice -> Advice -> show, page
"""
