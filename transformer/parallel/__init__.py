"""Parallelism: the devices, their mesh and its sharding rules, hosts, and replicas of a run.

Imports only the base files of the package: `errors`, `knobs`.
"""
