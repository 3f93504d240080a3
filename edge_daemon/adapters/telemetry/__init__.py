"""Readers of the device's load: host, cgroup, NVIDIA, Jetson.

`sampler.Sampler` is the thread that reads them, `gpus.source` chooses the reader of GPUs; `facts.static_facts` says
what changes by the boot only. What is read where: `docs/operations.md`.
"""
