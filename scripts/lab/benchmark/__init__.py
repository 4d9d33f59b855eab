"""The benchmark: this library beside its peers, on the same task, sizes, precision and threads.

Each contender runs in a process of its own (`worker`), since two frameworks in one process compete
for its threads; the processes take turns (`measure`). The extra `bench` installs the peers.
"""
