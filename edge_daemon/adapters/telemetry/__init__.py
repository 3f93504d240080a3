"""Readers of the device's load: host, cgroup, NVIDIA.

`sampler.Sampler` is the thread that reads them; `facts.static_facts` says what changes by the boot only.
"""
