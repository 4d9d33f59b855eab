"""Parallelism: the device mesh and its sharding rules, several hosts, and replicas of a run.

Imports only the base files of the package: `errors`, `files`, `console`.
"""
