"""Our own double of TensorRT-LLM's executor, as far as a KV cache connector can see it.

Written from the interface's contract, not from TensorRT-LLM's code, and never compared with a
running TensorRT-LLM. It is as strict as upstream's manager: whatever would throw there throws here.

    oracle.py     the bytes of every token's KV, and the next token: functions of the whole prefix
    pool.py       one rank's pool: checks what a forward pass reads, writes what it computes
    stream.py     the device's order of work, at once or behind the host
    requests.py   a request, and what a connector may see of it
    blocks.py     allocation, the reuse tree, eviction, pins
    reports.py    SchedulerOutput, turn by turn
    manager.py    the connector's manager: broadcasts, asynchronous loads and saves
    batches.py    which requests run in a turn
    executor.py   the loop, plain and overlapped; rules.py: its options
    scripted.py   a connector whose answers a test decides
    site.py       what outlives a replica: stores, their moods, the truth about every block
    replica.py    the classes under test on top of that; processes.py: ranks and engines elsewhere
    world.py      several replicas, and all that can happen to them
"""
