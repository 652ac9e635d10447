"""What a process runs on and with: device, process group, launcher, signals."""
