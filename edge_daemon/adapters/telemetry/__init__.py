"""Readers of the device's load: host, cgroup, NVIDIA."""
