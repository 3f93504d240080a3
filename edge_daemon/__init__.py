"""The edge daemon: a light long-running process that supervises the training agent of one device."""
