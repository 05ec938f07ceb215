"""LCO in other trainers: a file each, which alone imports that trainer."""
