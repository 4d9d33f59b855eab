"""The benchmark: this library beside its peers, on the same task, sizes, precision and threads.

Each contender runs in a process of its own (`worker`), because two frameworks in one process
compete for its threads. The processes take turns in random order (`measure`), one at a time: what
slows the machine slows all of them. The extra `bench` installs the peers.
"""
