"""Where models live and run: the engine seam and the lanes of the devices."""
