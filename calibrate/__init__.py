"""Text in, calibration statistics out: sources, windows, layer inputs, Hessians, token importance."""
