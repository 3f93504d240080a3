"""What `muster-edge doctor` reads of this device: keys, broker, clock, disk, GPUs, kernels. `core.diagnosis` judges."""
