"""This code beside what people would use instead: the same task, sizes, precision and threads.

Each contender runs in a process of its own (`worker`), since two frameworks in one process
fight over its threads; the processes take turns in random order (`rotation`), so that only one
works at a time and what slows the machine slows all of them. Only the workers of the peers
import their packages, which the extra `bench` installs.
"""
