"""Where a run takes place: devices, offload files, memory, progress."""
