"""Data modules: one data source per file. Images are uint8 on the host and RGB in [0, 1] on the device."""
