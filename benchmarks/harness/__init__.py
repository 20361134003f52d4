"""What the benchmark of peers is made of: layers, contenders, timing, ceilings, tables and plots."""
