"""`trtpool run`: an offline job, from files to a file.

The parent (`job`, `work`) plans the work as chunks of rows (`sources`, `shards`), embeds a pool, and starts producers
(`crew`, `produce`), which read rows (`reading`), decode them straight into slots (`images`, `functions`) and send
finished chunks back (`columns`, `wire`).  The parent appends them to the sink (`sinks`, `table_sinks`) and notes each
in a journal (`journal`), which is what ``--resume`` goes by.
"""
